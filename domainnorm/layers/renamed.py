"""Old names of arguments and attributes, which are accepted with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def renamed_arguments(names: Mapping[str, str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For an `__init__`: keyword arguments by their old names, `{old: new}`, with a FutureWarning.

    Raises:
        TypeError: an argument is given by both names.
    """

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def renamed(self: Any, *args: Any, **options: Any) -> None:
            for old in names.keys() & options.keys():
                new = names[old]
                if new in options:
                    raise TypeError(f"{type(self).__name__} got {new} twice: {old} is its old name")
                warnings.warn(f"{type(self).__name__}: {old} is now called {new}", FutureWarning, stacklevel=2)
                options[new] = options.pop(old)
            init(self, *args, **options)

        return renamed

    return decorate


def renamed_attribute(old: str, new: str) -> property:
    """The attribute `new`, asked for by its old name, with a FutureWarning."""

    def attribute(self: Any) -> Any:
        warnings.warn(f"{type(self).__name__}: {old} is now called {new}", FutureWarning, stacklevel=2)
        return getattr(self, new)

    return property(attribute)
