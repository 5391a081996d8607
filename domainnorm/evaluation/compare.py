"""One model, evaluated with several statistics, side by side."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..config import STATISTICS
from ..data import by_name, own_sets, test_loader
from ..data.classes import with_classes
from ..distributed import get_device, rank, world_size
from ..errors import UserError
from ..layers import DomainBatchNorm
from ..output import output_folder, write_json
from ..statistics.choose import refuse_torch_batch_norm, set_statistics
from ..statistics.merge import merge_population_statistics
from ..statistics.preserve import preserve_state
from .classification import accuracy, training_predictions
from .pictures import draw_some
from .recompute import recompute
from .tables import file_name, format_classes, format_table
from .test_set import TestSet, overall_scores
from .weigh import choose_weight

logger = logging.getLogger(__name__)


def evaluate(
    cfg: CfgNode,
    model: nn.Module,
    statistics: str | Sequence[str] | None = None,
    *,
    train_data: Dataset[Any] | Sequence[Dataset[Any]] | None = None,
    pictures: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Compute AP, or accuracy, of `model` on `cfg.DATASETS.TEST` for each of `statistics`; print them, also by class.

    Every rank calls it. For the evaluation, running statistics that differ between ranks are merged. Afterwards modes,
    statistics, example weights, buffers and random states are restored, so that training continues as if there had been
    none. Results are also written, with null for nan, to `OUTPUT_DIR/results.json`, and predictions to
    `OUTPUT_DIR/inference/<statistics>[/<data set>]/coco_instances_results.json` (`classification_results.json`).

    Args:
        cfg: from `load_config`.
        model: from `build_model` or `train`, or any whose `model(images)`, in eval mode, returns a list of dicts, as
            torchvision's detectors do: `boxes` (n, 4), XYXY in pixels of the image, `labels` (n,) int64, `scores` (n,)
            and, with `MODEL.MASK_ON`, `masks` (n, 1, H, W). Label k is the model's k-th class. A model of this library
            names its classes; for others `MODEL.CLASS_NAMES` does. The categories of the test sets are matched by name.
        statistics: "population", "minibatch", "recomputed" or a list of them; None: `cfg.TEST.STATISTICS`.
        train_data: as in `train`: the data, with its transforms, from which statistics are recomputed; None: the
            config's.
        pictures: None, or a dict to which rank 0 adds `cfg.TEST.PICTURES` images of each data set with the predictions
            under the first of `statistics`, by `"predictions[/<data set>]/<file>"`.

    Returns:
        On every rank `{statistics: {"bbox": {"AP": …, …}}}`, with "segm" beside "bbox" if `MODEL.MASK_ON`; for a
        classifier `{statistics: {"classification": {"top1": …, …}}}`. Values are in percent, nan if there is nothing to
        find. Values of one class are "AP-NAME", "AR-NAME" and "top1-NAME". With several test sets
        `{statistics: {name of the data set: {"bbox": …}}}`; with `DATASETS.DOMAINS` there is then also "overall", over
        all their images. With `TEST.EXAMPLE_WEIGHTS` there are also "population_weighed" and "recomputed_weighed", with
        the samples' own moments in inference. With `TEST.TRAINING_IMAGES` there is also "training": a classifier in
        training mode on images of the training sets.

    Raises:
        UserError: a test set that cannot be read, or statistics that the model does not have.

    Example::

        >>> results = dn.evaluate(cfg, model, statistics=["population", "minibatch"])  # doctest: +SKIP
        >>> results["population"]["bbox"]["AP"]  # doctest: +SKIP
        55.54
    """
    names = [statistics] if isinstance(statistics, str) else list(statistics or cfg.TEST.STATISTICS)
    for name in names:
        if name not in STATISTICS:
            raise UserError(f"statistics take any of {list(STATISTICS)}, got {name!r}")
    check_statistics(model, names)
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name a data set to evaluate on")
    if own := getattr(model, "description", {}).get("class_names"):
        cfg = with_classes(cfg, own)
    tests = {name: TestSet(cfg, entry) for name, entry in by_name(cfg.DATASETS.TEST).items()}
    validation = TestSet(cfg, cfg.TEST.EXAMPLE_WEIGHT_DATASET) if cfg.TEST.EXAMPLE_WEIGHT_DATASET else None
    if "recomputed" in names and cfg.TEST.RECOMPUTE.DATASET:
        test_loader(cfg, cfg.TEST.RECOMPUTE.DATASET, rank=rank(), world_size=world_size())  # its categories must fit
    device = get_device(cfg.MODEL.DEVICE)
    own_data = None if train_data is None else own_sets(train_data)
    results: dict[str, Any] = {}
    for name in names:
        with preserve_state(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            merge_population_statistics(model)
            if name == "recomputed":
                recompute(cfg, _with_statistics(model, "auto"), own_data)
            _with_statistics(model.eval(), "minibatch" if name == "minibatch" else "population")
            results[name] = _on_each(cfg, model, tests, name)
            if pictures is not None and rank() == 0 and name == names[0]:
                pictures.update(_draw(cfg, tests))
            if cfg.TEST.EXAMPLE_WEIGHTS and name != "minibatch":
                weighed = choose_weight(cfg, model, validation, f"{name}_weighed", own_data)
                if weighed is None:
                    continue
                results[f"{name}_weighed"] = _on_each(cfg, weighed, tests, f"{name}_weighed")
    if cfg.MODEL.META_ARCHITECTURE == "Classifier" and cfg.TEST.TRAINING_IMAGES:
        with preserve_state(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            classes = next(iter(tests.values())).loader.dataset.class_names  # the model's
            scores = {"classification": accuracy(training_predictions(cfg, model, device, own_data), classes)}
        results["training"] = dict.fromkeys(tests, scores)
    if rank() == 0:
        table = "\n\n".join(filter(None, [format_table(results), format_classes(results)]))
        print(table, flush=True)
        logger.info("results\n%s", table, extra={"file_only": True})  # the console has it
    if len(tests) == 1:
        results = {name: next(iter(result.values())) for name, result in results.items()}
    if rank() == 0:
        write_json(output_folder(cfg.OUTPUT_DIR) / "results.json", _nan_to_none(results))
    return results


def check_statistics(model: nn.Module, names: Sequence[str]) -> None:
    """UserError if `evaluate` cannot score `model` with the statistics `names`: torch's norms cannot choose them."""
    if "minibatch" in names:
        try:
            refuse_torch_batch_norm(model)
        except TypeError as error:
            raise UserError(f"TEST.STATISTICS 'minibatch': {error}") from error


def _with_statistics(model: nn.Module, statistics: str) -> nn.Module:
    """`set_statistics` of this library's layers; torch's have population statistics in eval mode, and no other."""
    for module in model.modules():
        if isinstance(module, DomainBatchNorm):
            set_statistics(module, statistics)
    return model


def _on_each(cfg: CfgNode, model: nn.Module, tests: dict[str, TestSet], name: str) -> dict[str, Any]:
    folder = output_folder(cfg.OUTPUT_DIR) / "inference" / name
    found = {
        data_set: test.scores(model, folder / (file_name(data_set) if len(tests) > 1 else ""))
        for data_set, test in tests.items()
    }
    if len(tests) > 1 and cfg.DATASETS.DOMAINS:
        found["overall"] = overall_scores(list(tests.values()))
    return found


def _draw(cfg: CfgNode, tests: dict[str, TestSet]) -> dict[str, Tensor]:
    return {
        f"predictions/{f'{name}/' if len(tests) > 1 else ''}{file}": picture
        for name, test in tests.items()
        for file, picture in draw_some(test.loader.dataset, test.predictions, cfg.TEST.PICTURES).items()
    }


def _nan_to_none(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _nan_to_none(value) for key, value in tree.items()}
    return None if math.isnan(tree) else tree
