"""What `MODEL.WEIGHTS` names: weights of torchvision, or a file, whoever has written and wrapped it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torchvision
from torch import Tensor

from ..errors import UserError
from .checkpoint_file import read_checkpoint, state_dict_of
from .description import check_architecture, class_names_in

_COMPILED = "_orig_mod."  # what torch.compile puts before the names of the module that it wraps


class Weights(NamedTuple):
    """A state dict, where it is from, and the names of its classes, without background; []: not known."""

    state_dict: dict[str, Tensor]
    source: str
    class_names: list[str]


def read_weights(weights: str) -> Weights:
    """What `MODEL.WEIGHTS` names: weights of torchvision, or those in a file; of `""` nothing.

    Raises:
        UserError: no such weights, or a broken file.
    """
    if not weights:
        return Weights({}, "", [])
    if re.fullmatch(r"\w+_Weights\.\w+", weights):
        try:
            known = torchvision.models.get_weight(weights)
            state, names = known.get_state_dict(check_hash=True), _categories(known)
        except (ValueError, KeyError) as error:  # no such enum, no such member
            raise UserError(f"MODEL.WEIGHTS {weights}: torchvision knows no such weights") from error
        except (OSError, RuntimeError) as error:  # RuntimeError: the file is not the one that torchvision knows
            raise UserError(f"MODEL.WEIGHTS {weights}: cannot be downloaded ({error}); give a file instead") from error
    else:
        content = read_checkpoint(weights)
        check_architecture(content, weights)
        state = state_dict_of(content, weights)
        names = class_names_in(content, weights) or _categories_of_file(Path(weights).name)
    if names[:1] == ["__background__"] and any("roi_heads." in key for key in state):
        names = names[1:]
    return Weights(state, weights, names)


def _categories(known: Any) -> list[str]:
    """The names of the classes of weights of torchvision; those of COCO's that no image has get different ones."""
    return [f"N/A {k}" if name == "N/A" else name for k, name in enumerate(known.meta.get("categories", []))]


def _categories_of_file(name: str) -> list[str]:
    """… of a file that is called as torchvision's own is."""
    return next((_categories(known) for known in _torchvision_weights() if known.url.rsplit("/")[-1] == name), [])


def _torchvision_weights() -> Iterator[Any]:
    for module in (torchvision.models, torchvision.models.detection):
        for model in torchvision.models.list_models(module=module):
            yield from torchvision.models.get_model_weights(model)


def unwrapped(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of `state` that are of a module with the keys `own`, by the names that they have there.

    Before these there may be those of what it was part of: `module.` of DistributedDataParallel, `_orig_mod.` of
    torch.compile, `model.` or another attribute of a LightningModule. What is beside it is left out.
    """
    state = {key.replace(_COMPILED, ""): value for key, value in state.items()}
    prefix = _prefix(state, own)
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What to take off so that most of `own` is found."""
    first = next((key for key in own if any(f".{other}".endswith(f".{key}") for other in state)), None)
    if first is None:
        return ""
    prefixes = [key.removesuffix(first) for key in state if f".{key}".endswith(f".{first}")]
    return max(prefixes, key=lambda prefix: sum(f"{prefix}{key}" in state for key in own))
