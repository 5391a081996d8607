"""The classes of a config's model, and the labels of each data set among them."""

import difflib
import logging
from collections.abc import Iterable, Sequence
from types import ModuleType

from fvcore.common.config import CfgNode

from ..config.node import get_value
from ..config.schema.model import NUM_CLASSES
from ..distributed import rank
from ..errors import UserError
from . import classification_sets, detection_sets
from .classification import ClassificationDataset
from .coco import CocoDataset

logger = logging.getLogger(__name__)
AnySet = CocoDataset | ClassificationDataset


def kind(cfg: CfgNode) -> ModuleType:
    """The module that opens the data sets of the architecture and says what forms a batch."""
    return classification_sets if cfg.MODEL.META_ARCHITECTURE == "Classifier" else detection_sets


def num_classes(cfg: CfgNode) -> int:
    """What the config says or, where it says 0, the number of classes of its training sets (else first test set).

    Raises:
        UserError: 0 and no data set, or it is missing or broken, or training sets do not fit together.
    """
    key, number = _classes_option(cfg)
    number = number or len(cfg.MODEL.CLASS_NAMES)
    if not number and not cfg.DATASETS.TRAIN and not cfg.DATASETS.TEST:
        raise UserError(f"DATASETS.TRAIN and DATASETS.TEST are empty; name a data set, or set {key}")
    return number or len(_read(cfg, cfg.DATASETS.TRAIN or cfg.DATASETS.TEST[:1]))


def known_classes(cfg: CfgNode) -> list[str]:
    """The names of the model's classes: `MODEL.CLASS_NAMES`, else those of the training sets if these are here.

    []: nothing says them.
    """
    sets = cfg.DATASETS.TRAIN
    if cfg.MODEL.CLASS_NAMES or not sets:
        return list(cfg.MODEL.CLASS_NAMES)
    read = sets if cfg.DATASETS.LABELS == "union" else sets[:1]
    return [] if any(kind(cfg).class_names(name) is None for name in read) else _read(cfg, sets)


def with_classes(cfg: CfgNode, names: Sequence[str]) -> CfgNode:
    """A config that says what the classes of its model are, so that nobody needs a data set to know.

    Args:
        names: for `MODEL.CLASS_NAMES`; where two are equal, or one is empty, they are no names and are left out.
    """
    key, number = _classes_option(cfg)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.CLASS_NAMES = list(names) if _are_names(names) else []
    cfg.merge_from_list([key, number or len(names) or num_classes(cfg)])
    cfg.freeze()
    return cfg


def label_training_sets(cfg: CfgNode, datasets: Sequence[AnySet]) -> None:
    """Give all of `DATASETS.TRAIN`, opened, the labels of the model.

    Raises:
        UserError: their categories are not equal, or others than the model has; a new name for none of them.
    """
    known = {name for dataset in datasets for name in dataset.class_names}
    for old in _renamed(cfg):
        if old not in known and not any(old in (kind(cfg).class_names(name) or ()) for name in cfg.DATASETS.TEST):
            nearest = difflib.get_close_matches(old, known, n=1, cutoff=0.0)[0]
            raise UserError(f"DATASETS.RENAME {old!r}: no data set has such a category; nearest: {nearest!r}")
    together = _together(cfg, [(dataset.name, _names(cfg, dataset.class_names)) for dataset in datasets])
    classes = list(cfg.MODEL.CLASS_NAMES) or together
    lowered = {name.lower(): name for name in classes}
    for name in classes:
        if name != lowered[name.lower()]:
            logger.warning("%r and %r are two classes: DATASETS.RENAME makes them one", name, lowered[name.lower()])
    for dataset in datasets:
        _label(cfg, dataset, classes, "DATASETS.TRAIN")


def label_other_set(cfg: CfgNode, dataset: AnySet, key: str) -> None:
    """Give `dataset`, named in option `key`, the labels of the model; its own if nothing says what these are.

    Raises:
        UserError: it has categories that the model has not or, if `DATASETS.LABELS` is "equal", not all of them;
            "union", and a training set is not on this machine.
    """
    union, sets = cfg.DATASETS.LABELS == "union", cfg.DATASETS.TRAIN
    classes = known_classes(cfg) or (_read(cfg, sets) if union and sets else [])
    if not classes and rank() == 0:
        logger.warning(
            "%s: nothing says what the classes of the model are called: labels are those of the file, in its order; "
            "MODEL.CLASS_NAMES names them",
            dataset.name,
        )
    _label(cfg, dataset, classes or _names(cfg, dataset.class_names), key)


def _label(cfg: CfgNode, dataset: AnySet, classes: list[str], key: str) -> None:
    """Labels by the names of the classes."""
    own, union = _names(cfg, dataset.class_names), cfg.DATASETS.LABELS == "union"
    missing = [name for name in own if name not in classes]
    if union and missing:
        raise UserError(
            f"{key}: {dataset.name} has the categories {missing}, which the model, trained on {classes}, has not; "
            "remove them from its file, or say by DATASETS.RENAME which of the model's they are"
        )
    if not union and not equal_classes(own, classes):
        raise UserError(
            f"{key}: {dataset.name} has the categories {own}, the model is trained on {classes}; they must be equal, "
            "or DATASETS.LABELS union, with which a data set may have some of them"
        )
    option, number = _classes_option(cfg)
    if number and len(classes) > number:
        raise UserError(
            f"{option} {number} contradicts data set {dataset.name}, with which the model has {len(classes)} "
            "categories; raise it, or set it to 0 to take the data sets' number"
        )
    if _by_name(cfg) or own != classes:
        dataset.relabel(classes, _renamed(cfg))


def equal_classes(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether they are the same classes: the same names, in any order if they tell classes apart."""
    return list(names) == list(others) or (_are_names(names) and sorted(names) == sorted(others))


def _are_names(names: Sequence[str]) -> bool:
    """Whether each class has one of its own."""
    return all(names) and len(set(names)) == len(names)


def _read(cfg: CfgNode, names: Iterable[str]) -> list[str]:
    """The classes of a model that is trained on the data sets `names`; no image is read."""
    by_name = cfg.DATASETS.LABELS == "union"
    read = list(names) if by_name else list(names)[:1]
    return _together(cfg, [(name, _names(cfg, kind(cfg).class_names(name, must_exist=True))) for name in read])


def _together(cfg: CfgNode, sets: list[tuple[str, list[str]]]) -> list[str]:
    """The classes of data sets with these names and classes."""
    first, classes = sets[0]
    if cfg.DATASETS.LABELS == "union":
        return list(dict.fromkeys(name for _, names in sets for name in names))
    for other, names in sets:
        if names != classes:
            raise UserError(
                f"DATASETS.TRAIN: {first} has the categories {classes}, {other} has {names}; they must be equal, in "
                "the same order, to train on both, or DATASETS.LABELS union; DATASETS.RENAME gives them other names"
            )
    return classes


def _names(cfg: CfgNode, names: list[str]) -> list[str]:
    """Names of the classes of one data set as they are compared."""
    renamed = _renamed(cfg)
    return list(dict.fromkeys(renamed.get(name, name) for name in names)) if _by_name(cfg) else names


def _by_name(cfg: CfgNode) -> bool:
    """Whether categories of one name are one."""
    return bool(cfg.DATASETS.RENAME) or cfg.DATASETS.LABELS == "union"


def _renamed(cfg: CfgNode) -> dict[str, str]:
    return {old.strip(): new.strip() for old, new in (entry.split("=") for entry in cfg.DATASETS.RENAME)}


def _classes_option(cfg: CfgNode) -> tuple[str, int]:
    """The key that gives the architecture its number of classes, and the number; 0: the data sets'."""
    key = NUM_CLASSES[cfg.MODEL.META_ARCHITECTURE]
    return key, get_value(cfg, key)
