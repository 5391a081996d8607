"""Which backend the library chooses for tensors, and which ones a layer took: the one place that knows how."""

import logging
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from domainnorm.ops import eager, native, select, triton

FASTEST = {"cuda": "triton"}  # what is expected of a device, where a layer is not torch's own


def chosen(xs: Sequence[Tensor]) -> ModuleType:
    """The module whose functions can be given `xs`. The first call on a device compiles and compares them."""
    with torch.no_grad():
        return next((module for module in (triton, native) if not module.refusal(xs)), eager)


def name_of(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def used_by(run: Callable[[], object]) -> str:
    """The backends that compute what `run()` normalizes; "another way", such as by constants, if none."""
    notes = _Names()
    level = select.logger.level
    select.logger.addHandler(notes)
    select.logger.setLevel(logging.DEBUG)
    try:
        run()
    finally:
        select.logger.setLevel(level)
        select.logger.removeHandler(notes)
    return ", ".join(sorted(notes.names)) or "another way"


class _Names(logging.Handler):
    """The first word of each message, which is the name of a backend."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.names: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.names.add(record.getMessage().split()[0])
