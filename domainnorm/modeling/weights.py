"""Loading weights: all of them, or an error and nothing."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path

import torchvision
from torch import Tensor, nn

from ..errors import UserError, cut, one_line
from .checkpoint_file import read_checkpoint, state_dict_of


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


def initialize(model: nn.Module, weights: str) -> None:
    """Load what `MODEL.WEIGHTS` names into a detector.

    Args:
        model: with its torchvision body at `model.backbone.body`.
        weights: `""`: nothing is loaded. A name of torchvision, such as `ResNet50_Weights.IMAGENET1K_V2`, is
            downloaded by torchvision. Otherwise a file: a checkpoint of the whole model, or of a classifier or its
            state dict (without its last layer).

    Raises:
        UserError: no such weights, a broken file, or weights that do not fit; the model is left as it was.
    """
    if not weights:
        return
    state = read_weights(weights)
    if any(key.startswith("backbone.") for key in state):
        load_weights(model, state, weights)
    else:
        # of one of our classifiers, or as torchvision names it
        state = {key.removeprefix("body.").removeprefix("features."): value for key, value in state.items()}
        body = {key: value for key, value in state.items() if not key.startswith(("fc.", "classifier."))}
        load_weights(model.get_submodule("backbone.body"), body, weights)


def read_weights(weights: str) -> dict[str, Tensor]:
    """The state dict that `MODEL.WEIGHTS` names: weights of torchvision, or those in a file.

    Raises:
        UserError: no such weights, or a broken file.
    """
    if re.fullmatch(r"\w+_Weights\.\w+", weights):
        try:
            return torchvision.models.get_weight(weights).get_state_dict(check_hash=True)
        except (ValueError, KeyError) as error:  # no such enum, no such member
            raise UserError(f"MODEL.WEIGHTS {weights}: torchvision knows no such weights") from error
        except (OSError, RuntimeError) as error:  # RuntimeError: the file is not the one that torchvision knows
            raise UserError(f"MODEL.WEIGHTS {weights}: cannot be downloaded ({error}); give a file instead") from error
    return state_dict_of(read_checkpoint(weights), weights)


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
