"""Which implementation the library chooses for tensors, and which one a layer took: the one place that knows how."""

from collections.abc import Callable, Sequence
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from domainnorm import kernels, moments
from domainnorm.kernels import plain

FASTEST = {"cuda": "triton_rows"}  # what is expected of a device, where a layer is not torch's own
REFERENCE: ModuleType = plain


def chosen(xs: Sequence[Tensor]) -> ModuleType:
    """The module whose functions compute the rows of `xs`. The first call on a device compiles and compares them."""
    with torch.no_grad():
        return kernels.kernel(xs)


def name_of(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def used_by(run: Callable[[], object]) -> str:
    """The modules that `run()` takes functions of rows from; "another way", such as torch's own kernel, if none."""
    names = set()
    choose = moments.kernel

    def noted(xs: Sequence[Tensor]) -> ModuleType:
        module = choose(xs)
        names.add(name_of(module))
        return module

    with mock.patch.object(moments, "kernel", noted):
        run()
    return ", ".join(sorted(names)) or "another way"
