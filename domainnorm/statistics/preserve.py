"""A model left as it was found."""

import copy
import functools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..layers import DomainBatchNorm

F = TypeVar("F", bound=Callable[..., Any])
_TORCHS = vars(nn.Module())  # what torch itself keeps in a module, hooks, parameters, buffers and children among it


@contextmanager
def preserve_state(model: nn.Module, *, only_on_error: bool = False) -> Iterator[None]:
    """After the block `model` is as before it: modes, attributes, hooks, layers, buffers and what requires a gradient.

    Attributes of a user's own modules are what they were, but not restored within: a list keeps what was appended.

    Args:
        model: any module.
        only_on_error: leave it as the block makes it, unless that raises.
    """
    modules = [(module, type(module), _contents(module)) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not is_lazy(buffer)]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters() if not is_lazy(parameter)]

    def restore() -> None:
        for module, kind, contents in modules:
            if type(module) is kind:  # not of a lazy layer that has become what it was lazy for
                _restore(module, contents)
        for parameter, required in gradients:
            parameter.requires_grad_(required)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)

    try:
        yield
    except BaseException:
        restore()
        raise
    if not only_on_error:
        restore()


def unchanged_on_error(function: F) -> F:
    """A function of a model and others, after which, if it raises, the model is as it was."""

    @functools.wraps(function)
    def wrapped(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with preserve_state(model, only_on_error=True):
            return function(model, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _contents(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and a copy of what is in it where that is restored too."""

    def is_restored(key: str, value: Any) -> bool:
        known = key in _TORCHS or isinstance(module, DomainBatchNorm)
        return known and isinstance(value, (dict, set, list, deque))

    return {k: (value, copy.copy(value) if is_restored(k, value) else None) for k, value in vars(module).items()}


def _restore(module: nn.Module, contents: dict[str, tuple[Any, Any]]) -> None:
    for value, copied in contents.values():
        if copied is not None:  # in place: the handles of hooks know the very dict
            value.clear()
            value.update(copied) if isinstance(value, (dict, set)) else value.extend(copied)
    vars(module).clear()
    vars(module).update((key, value) for key, (value, _) in contents.items())
