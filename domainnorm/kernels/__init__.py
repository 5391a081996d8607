"""The kernels of each device, layout, type and size, chosen here.

Those of rows are the same four functions of tensors `(N_i, C, *)` and numbers `(ΣN, C)` of their rows: `plain` is the
reference, which runs everywhere, on any layout and type, differentiably, and compiles; `compiled` is C++ on a CPU,
`triton_rows` Triton on a GPU. Those of whole normalization batches (`compiled_batches`) are C++ alone: what a layer
makes of rows is their reference.
"""

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import compiled, gpu, library, plain
from .library import takes_batches, takes_statistics

__all__ = ["SMALL", "kernel", "prefers_batch_norm", "prefers_operator", "takes_batches", "takes_statistics"]

SMALL = 400_000  # elements of a tensor: with fewer, calls cost more than the work
SHORT = 32  # elements of a row: with fewer, starting it does


def kernel(xs: Sequence[Tensor]) -> ModuleType:
    """The fastest kernel for `xs` here."""
    # what a compiler joins, or what is differentiated, must be operations of torch
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return plain
    if library.takes(xs):
        return compiled
    return gpu.rows(xs) or plain


def prefers_batch_norm(x: Tensor) -> bool:
    """Whether torch's own kernel is the faster one where a normalization batch is `x` and nothing else."""
    return x.numel() < SMALL or math.prod(x.shape[2:]) < SHORT or not library.takes([x])


def prefers_operator(xs: Sequence[Tensor]) -> bool:
    """Whether within `torch.compile` the kernel of whole batches is faster for `xs` than what the compiler makes."""
    large = sum(x.numel() for x in xs) >= SMALL
    # an exported program is to run elsewhere; the compiler of torch 2.11 always says that it exports
    return large and not torch.compiler.is_exporting() and takes_batches(xs)
