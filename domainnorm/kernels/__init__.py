"""Row by row: moments, an affine, and their gradients; the kernels of each device and layout, chosen here.

Every kernel is the same four functions of a tensor `(N, C, *)` and numbers `(N, C)` of its rows; `plain` is the
reference, which runs everywhere, on any layout and type, differentiably, and compiles.
"""

from types import ModuleType

import torch
from torch import Tensor

from . import channels_last, compiled, contiguous, plain

FEWEST = 32  # elements of a row: with shorter ones, the numbers of rows cost more than the rows
SMALL = 100_000  # elements of a tensor: below, calls cost more than the work


def kernel(x: Tensor) -> ModuleType:
    """The fastest kernel for `x` here."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return plain
    if compiled.takes(x):
        return compiled
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or not x.numel() or x.ndim < 3:
        return plain
    if x.is_contiguous():
        return contiguous
    return channels_last if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else plain


def prefers_batch_norm(x: Tensor) -> bool:
    """Whether torch's own kernel is the faster one where a normalization batch is `x` and nothing else."""
    if torch.compiler.is_compiling():
        return False
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or not x.is_contiguous():
        return True
    return x.ndim < 3 or x.numel() < SMALL or x.numel() < FEWEST * x.shape[0] * x.shape[1]
