"""Loading weights: all of them, or an error and nothing; or all that fit."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..errors import UserError, cut, one_line


def load_weights(model: nn.Module, state_dict: dict[str, Tensor], source: str | Path, remedy: str = "") -> None:
    """Load `state_dict` into `model`, strictly. On a mismatch the model is left as it was.

    Args:
        source: where the weights come from, for the message.
        remedy: its end, where they do not fit.

    Raises:
        UserError: naming the first keys that are missing, unexpected, of another shape or kind of number, or those
            of tensors that are not finite.
    """
    own = model.state_dict()
    kinds = [
        f"{key} (got {value.dtype}, expected {own[key].dtype})"
        for key, value in state_dict.items()
        if key in own and not _same_kind(value, own[key])
    ]
    if kinds:
        raise UserError(f"{source}: weights do not fit the model: mismatched {_first(kinds, 3)}{remedy}")
    # Layers may accept other shapes (`_load_from_state_dict`), so only loading tells: keep what was there.
    before = copy.deepcopy(own)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        model.load_state_dict(before)
        raise UserError(f"{source}: weights do not fit the model: {_mismatches(str(error))}{remedy}") from error
    _check_finite(model, before, source)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold nan or inf, with how many."""
    found = []
    for name, value in tensors.items():
        if value.is_floating_point() and not (finite := value.isfinite()).all():
            found.append(f"{name} ({int((~finite).sum())} of {value.numel()} numbers)")
    return found


def load_fitting(model: nn.Module, state_dict: dict[str, Tensor], source: str | Path) -> tuple[list[str], list[str]]:
    """Load what fits of `state_dict`; the keys of `model` that got nothing, and those that it does not have.

    Raises:
        UserError: numbers that are not finite, or nothing fits.
    """
    own = model.state_dict()
    state = {key: value for key, value in state_dict.items() if key in own and _same_kind(value, own[key])}
    before = copy.deepcopy(own)
    while True:
        try:
            model.load_state_dict(state, strict=False)
            break
        except RuntimeError as error:  # layers may accept other shapes, so only loading tells
            mismatched = set(re.findall(r"size mismatch for (\S+?):", str(error))) & state.keys()
            model.load_state_dict(before)
            if not mismatched:
                raise UserError(f"{source}: weights do not fit the model: {_mismatches(str(error))}") from error
            state = {key: value for key, value in state.items() if key not in mismatched}
    _check_finite(model, before, source)
    if not state:
        raise UserError(f"{source}: weights do not fit the model: not one of its {len(own)} entries is in them")
    return [key for key in own if key not in state], [key for key in state_dict if key not in own]


def _same_kind(value: Tensor, own: Tensor) -> bool:
    return value.is_floating_point() == own.is_floating_point()


def _check_finite(model: nn.Module, before: dict[str, Tensor], source: str | Path) -> None:
    if broken := not_finite(model.state_dict()):
        model.load_state_dict(before)
        raise UserError(f"{source}: weights that are not finite: {_first(broken, 3)}; take an earlier checkpoint")


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
