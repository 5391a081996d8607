"""The functions of segments on a GPU, in Triton: all tensors in one launch each. A segment here is one sample.

Whether Triton is there, finds what it needs and compiles for a device shows in its use only. So a process tries the
kernels once with each device and dtype, and compares them with `eager`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import eager
from ..moments import is_in_memory
from ..partition import Segments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TENSORS = 16  # a kernel has its own code for each
MIN_ROW, MAX_ROW = 32, 2**30  # numbers of the longest row: a program would be started for less; indices have 32 bits
NOT_INSTALLED = "triton is not installed"

_failures: dict[tuple[torch.device, torch.dtype], str] = {}  # "" where the kernels work


def unavailable() -> str:
    """Why Triton cannot be used here; "" if it can be tried."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return "" if _is_installed() else NOT_INSTALLED


def refusal(xs: Sequence[Tensor]) -> str:
    """Why the functions here cannot be given `xs`; "" if they can."""
    device, dtype, channels = xs[0].device, xs[0].dtype, xs[0].shape[1]
    if device.type != "cuda":
        return "it computes on CUDA devices"
    if dtype not in DTYPES:
        return "it computes in float32, bfloat16 and float16"
    if len(xs) > MAX_TENSORS or not channels:
        return f"it takes up to {MAX_TENSORS} tensors that have channels"
    if not MIN_ROW <= max(math.prod(x.shape[2:]) for x in xs) < MAX_ROW:
        return f"it takes channels of {MIN_ROW} numbers or more"
    for x in xs:
        if type(x) not in (Tensor, Parameter) or x.dtype != dtype or x.device != device or not x.is_contiguous():
            return "it takes contiguous tensors of one dtype on one device"
        if not is_in_memory(x):
            return "the numbers in memory are not those of a tensor"
    if (device, dtype) not in _failures:
        if torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode():
            return "it was not tried yet, and what is recorded or must not wait is no place for it"
        _failures[device, dtype] = failure(device, dtype)
    return _failures[device, dtype]


def moments(xs: Sequence[Tensor], segments: Segments) -> tuple[Tensor, Tensor]:
    """As `eager.moments`."""
    return _kernels().moments(xs)


def affine(xs: Sequence[Tensor], segments: Segments, scale: Tensor, center: Tensor, shift: Tensor) -> list[Tensor]:
    """As `eager.affine`."""
    return _kernels().affine(xs, scale, center, shift)


def sums(grads: Sequence[Tensor], xs: Sequence[Tensor], segments: Segments, center: Tensor) -> tuple[Tensor, Tensor]:
    """As `eager.sums`."""
    return _kernels().sums(grads, xs, center)


def gradient(grads: Sequence[Tensor], xs: Sequence[Tensor], segments: Segments, *values: Tensor) -> list[Tensor]:
    """As `eager.gradient`."""
    return _kernels().gradient(grads, xs, *values)


def failure(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels cannot be used with a device and dtype, with a warning; "" if they give what `eager` does."""
    if not _is_installed():
        reason = NOT_INSTALLED
    else:
        try:
            _compare(device, dtype)
            return ""
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler raises
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    warnings.warn(
        f"normalization on {device} in {dtype} goes without Triton's kernels, and is slower: {reason}", stacklevel=2
    )
    return reason


def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _kernels() -> ModuleType:
    return importlib.import_module(".kernels", __package__)  # triton is imported where it is used


SHAPES = ((2, 3, 5, 7), (1, 3, 96, 100))


def _compare(device: torch.device, dtype: torch.dtype) -> None:
    """AssertionError where the kernels differ from `eager`, for rows of several lengths."""
    xs, grads = ([_waves(shape, k, device).to(dtype) for shape in SHAPES] for k in range(2))
    samples = [None] * len(SHAPES)
    mean, var = eager.moments(xs, samples)
    scale, shift, slope, offset = (_waves(tuple(mean.shape), k, device) for k in range(2, 6))
    shift, slope = shift[:1], slope[:1]  # of all samples, as in a BatchNorm
    expected = [
        *(mean, var),
        *eager.affine(xs, samples, scale, mean, shift),
        *eager.sums(grads, xs, samples, mean),
        *eager.gradient(grads, xs, samples, scale, mean, slope, offset),
    ]
    found = [
        *moments(xs, samples),
        *affine(xs, samples, scale, mean, shift),
        *sums(grads, xs, samples, mean),
        *gradient(grads, xs, samples, scale, mean, slope, offset),
    ]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def _waves(shape: tuple[int, ...], k: int, device: torch.device) -> Tensor:
    """Numbers that no generator has to be asked for."""
    places = torch.arange(math.prod(shape), dtype=torch.float32, device=device)
    return (places * (k + 1.7)).sin().view(shape) + k
