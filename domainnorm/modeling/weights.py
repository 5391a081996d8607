"""Loading weights: all of them, or an error and nothing."""

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torchvision
from torch import Tensor, nn

from ..data.classes import equal_classes
from ..errors import UserError, cut, one_line, quote
from .checkpoint_file import read_checkpoint, state_dict_of
from .description import class_names_in
from .predictors import Predictors, class_entries, in_order

logger = logging.getLogger(__name__)


def load_weights(model: nn.Module, state_dict: dict[str, Tensor], source: str | Path) -> None:
    """Load `state_dict` into `model`, strictly. On a mismatch the model is left as it was.

    Args:
        source: where the weights come from, for the message.

    Raises:
        UserError: naming the first keys that are missing, unexpected, of another shape or kind of number, or those
            of tensors that are not finite.
    """
    own = model.state_dict()
    kinds = [
        f"{key} (got {value.dtype}, expected {own[key].dtype})"
        for key, value in state_dict.items()
        if key in own and value.is_floating_point() != own[key].is_floating_point()
    ]
    if kinds:
        raise UserError(f"{source}: weights do not fit the model: mismatched {_first(kinds, 3)}")
    # Layers may accept other shapes (`_load_from_state_dict`), so only loading tells: keep what was there.
    before = copy.deepcopy(own)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        model.load_state_dict(before)
        raise UserError(f"{source}: weights do not fit the model: {_mismatches(str(error))}") from error
    if broken := not_finite(model.state_dict()):
        model.load_state_dict(before)
        raise UserError(f"{source}: weights that are not finite: {_first(broken, 3)}; take an earlier checkpoint")


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold nan or inf, with how many."""
    found = []
    for name, value in tensors.items():
        if value.is_floating_point() and not (finite := value.isfinite()).all():
            found.append(f"{name} ({int((~finite).sum())} of {value.numel()} numbers)")
    return found


def initialize(model: nn.Module, weights: "Weights", class_names: Sequence[str], *, trained: bool) -> None:
    """Load `weights` into a detector.

    Args:
        model: with its torchvision body at `model.backbone.body`.
        weights: of the whole model, or of a classifier, of which the last layer is left out.
        class_names: of the model.
        trained: whether it takes only those of the whole model.

    Raises:
        UserError: they do not fit; the model is left as it was.
    """
    state, file = by_class_names(model.predictors(), weights, class_names), weights.source  # type: ignore[operator]
    if trained or any(key.startswith("backbone.") for key in state):
        load_weights(model, state, file)
    else:
        # of one of our classifiers, or as torchvision names it
        state = {key.removeprefix("body.").removeprefix("features."): value for key, value in state.items()}
        body = {key: value for key, value in state.items() if not key.startswith(("fc.", "classifier."))}
        load_weights(model.get_submodule("backbone.body"), body, file)


class Weights(NamedTuple):
    """A state dict, where it is from, and the names of the classes that its predictions are of; []: not known."""

    state_dict: dict[str, Tensor]
    source: str
    class_names: list[str]


def by_class_names(predictors: Predictors, weights: Weights, class_names: Sequence[str]) -> dict[str, Tensor]:
    """The state dict of `weights` with its classes in the order of `class_names`; as it is if either is not known.

    Raises:
        UserError: the names are others.
    """
    state, then, now = weights.state_dict, weights.class_names, list(class_names)
    if not then or not now or then == now or not any(class_entries(predictors, state)):
        return state
    if not equal_classes(then, now):
        raise UserError(
            f"{weights.source}: weights do not fit the model: they are of the classes {quote(then)}, it has "
            f"{quote(now)}; set MODEL.CLASS_NAMES to those of the weights, or DATASETS.RENAME"
        )
    logger.info("%s: its classes are %s: brought into the order of the model, %s", weights.source, then, now)
    return in_order(predictors, state, then, now)


def read_weights(weights: str) -> Weights:
    """What `MODEL.WEIGHTS` names: weights of torchvision, or those in a file; `""`: none.

    Raises:
        UserError: no such weights, or a broken file.
    """
    if not weights:
        return Weights({}, "", [])
    if re.fullmatch(r"\w+_Weights\.\w+", weights):
        try:
            known = torchvision.models.get_weight(weights)
            return Weights(known.get_state_dict(check_hash=True), weights, [])
        except (ValueError, KeyError) as error:  # no such enum, no such member
            raise UserError(f"MODEL.WEIGHTS {weights}: torchvision knows no such weights") from error
        except (OSError, RuntimeError) as error:  # RuntimeError: the file is not the one that torchvision knows
            raise UserError(f"MODEL.WEIGHTS {weights}: cannot be downloaded ({error}); give a file instead") from error
    content = read_checkpoint(weights)
    return Weights(state_dict_of(content, weights), weights, class_names_in(content, weights))


def _mismatches(message: str, most: int = 3) -> str:
    """torch's message of one line a mismatch, with hundreds of keys, as one line with the first few."""
    found: list[str] = []
    shapes: list[str] = []
    for line in message.splitlines()[1:]:
        if names := re.match(r"\s*(Missing|Unexpected) key\(s\) in state_dict: (.*)", line):
            keys = re.findall(r'"([^"]+)"', names[2])
            found.append(f"{names[1].lower()} {_first(keys, most)}")
        elif shape := re.match(r"\s*size mismatch for (\S+): .*Size\((.*?)\).*Size\((.*?)\)", line):
            shapes.append(f"{shape[1]} (got {shape[2]}, expected {shape[3]})")
        elif line.strip():
            shapes.append(cut(one_line(line)))
    if shapes:
        found.append(f"mismatched {_first(shapes, most)}")
    return "; ".join(found)


def _first(items: list[str], most: int) -> str:
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest
