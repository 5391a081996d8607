"""Reading checkpoint files and loading weights: all of them, or an error and nothing."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from ..errors import UserError
from ..paths import user_path


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """What `torch.save` wrote to `file`, on the CPU. Never runs code from the file (`weights_only=True`).

    Raises:
        UserError: no such file, a broken or truncated one, or one that holds more than weights (says what).
    """
    path = user_path(file)
    if not path.is_file():
        raise UserError(f"checkpoint {file}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"checkpoint {file}: permission denied") from error
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise UserError(f"checkpoint {file}: broken, or not written by torch.save") from error
        raise UserError(
            f"checkpoint {file}: refused, because it holds {refused[1]}, which may run code when loaded; "
            "save its state_dict alone"
        ) from error
    except Exception as error:  # a truncated file: EOFError, RuntimeError, KeyError, … depending on where it was cut
        raise UserError(f"checkpoint {file}: broken or truncated ({_one_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {file}: expected a state_dict, got {type(content).__name__}")
    return content


def load_weights(model: nn.Module, state_dict: dict[str, Tensor], source: str | Path) -> None:
    """Load `state_dict` into `model`, strictly. On a mismatch the model is left as it was.

    Args:
        source: where the weights come from, for the message.

    Raises:
        UserError: naming the first keys that are missing, unexpected or of another shape.
    """
    # Layers may accept other shapes (`_load_from_state_dict`), so only loading tells: keep what was there.
    before = copy.deepcopy(model.state_dict())
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        model.load_state_dict(before)
        raise UserError(f"{source}: weights do not fit the model: {_mismatches(str(error))}") from error


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
        except OSError as error:
            raise UserError(f"MODEL.WEIGHTS {weights}: cannot be downloaded ({error}); give a file instead") from error
    content = read_checkpoint(weights)
    return content.get("model", content)


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
            shapes.append(_one_line(line))
    if shapes:
        found.append(f"mismatched {_first(shapes, most)}")
    return "; ".join(found)


def _first(items: list[str], most: int) -> str:
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def _one_line(text: object) -> str:
    return " ".join(str(text).split()).split(". ")[0]
