"""The functions of segments on a CPU, in C++: what `eager` computes, in one pass over each tensor; and gradients."""

from __future__ import annotations

import ctypes
import itertools
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ..eager import number_of_segments
from ..moments import accumulate_dtype, is_in_memory
from ..partition import Segments
from . import library
from .library import DTYPES, Values

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

_LIBRARY, description = library.load(library.processor())
if _LIBRARY is None and "run pip install again" in description:
    warnings.warn(description, stacklevel=2)


def is_available() -> bool:
    """Whether the library was compiled and can be used."""
    return _LIBRARY is not None


def refusal(xs: Sequence[Tensor]) -> str:
    """Why the functions here cannot be given `xs`; "" if they can."""
    if _LIBRARY is None:
        return description
    dtype = xs[0].dtype
    if dtype not in DTYPES:
        return f"its dtypes are {', '.join(DTYPES.values())}"
    for x in xs:
        if not x.is_cpu:
            return "it computes on CPUs"
        if type(x) not in (Tensor, Parameter):
            return "tensor subclasses may have no memory"
        if x.dtype != dtype:
            return "the tensors are of several dtypes"
        if not is_in_memory(x):
            return "the numbers in memory are not those of a tensor"
        if not x.shape[1] or not (x.is_contiguous() or is_channels_last(x)):
            return "it takes contiguous and channels_last tensors"
    return ""


def moments(xs: Sequence[Tensor], segments: Segments) -> tuple[Tensor, Tensor]:
    """As `eager.moments`."""
    mean, var = _tables(xs, segments)
    _call("moments", xs, _parts(xs, segments), mean.data_ptr(), var.data_ptr())
    return mean, var


def affine(xs: Sequence[Tensor], segments: Segments, scale: Tensor, center: Tensor, shift: Tensor) -> list[Tensor]:
    """As `eager.affine`."""
    ys = [torch.empty_like(x) for x in xs]
    kept, values = _values(xs, segments, scale, center, shift)
    _call("affine", xs, _parts(xs, segments, outs=ys), *values)
    del kept
    return ys


def sums(grads: Sequence[Tensor], xs: Sequence[Tensor], segments: Segments, center: Tensor) -> tuple[Tensor, Tensor]:
    """As `eager.sums`."""
    total, products = _tables(xs, segments)
    grads = _in_layout(grads, xs)
    kept, values = _values(xs, segments, center)
    _call("sums", xs, _parts(xs, segments, grads=grads), *values, total.data_ptr(), products.data_ptr())
    del kept
    return total, products


def gradient(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    segments: Segments,
    scale: Tensor,
    center: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> list[Tensor]:
    """As `eager.gradient`."""
    outs = [torch.empty_like(x) for x in xs]
    grads = _in_layout(grads, xs)
    kept, values = _values(xs, segments, scale, center, slope, offset)
    _call("gradient", xs, _parts(xs, segments, outs, grads), *values)
    del kept
    return outs


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of each place lie side by side."""
    layout = CHANNELS_LAST.get(x.ndim)
    return layout is not None and x.is_contiguous(memory_format=layout)


def _call(
    function: str, xs: Sequence[Tensor], parts: tuple[ctypes.Array[ctypes.c_int64], int], *others: object
) -> None:
    """A function for the dtype of `xs`, on torch's threads."""
    getattr(_LIBRARY, f"{function}_{DTYPES[xs[0].dtype]}")(*parts, xs[0].shape[1], torch.get_num_threads(), *others)


def _parts(
    xs: Sequence[Tensor], segments: Segments, outs: Sequence[Tensor] = (), grads: Sequence[Tensor] = ()
) -> tuple[ctypes.Array[ctypes.c_int64], int]:
    """The parts of `segments.h`, and their number: neighboring segments of equal size of one tensor are one."""
    words: list[int] = []
    for k, (x, sizes) in enumerate(zip(xs, segments, strict=True)):
        shape = x.shape
        grad, at, out = grads[k].data_ptr() if grads else 0, x.data_ptr(), outs[k].data_ptr() if outs else 0
        length = math.prod(shape[2:])
        channels_last = length == 1 or not x.is_contiguous()
        if sizes is None or len(sizes) == 1:
            words += (grad, at, out, *((shape[0], 1) if sizes is None else (1, shape[0])), length, channels_last)
            continue
        step = shape[1] * length * x.element_size()  # bytes of a sample
        for size, run in itertools.groupby(sizes):
            number = len(list(run))
            words += (grad, at, out, number, size, length, channels_last)
            grad, at, out = (v and v + number * size * step for v in (grad, at, out))
    return (ctypes.c_int64 * len(words))(*words), len(words) // 7


def _values(xs: Sequence[Tensor], segments: Segments, *values: Tensor) -> tuple[list[Tensor], list[Values]]:
    """Values `(S, C)` or `(1, C)` in the dtype of the moments: the tensors, which must be kept, and where they are.

    Raises:
        RuntimeError: another shape or device, which C++ would not notice.
    """
    dtype, channels = accumulate_dtype(xs[0]), xs[0].shape[1]
    kept, found = [], []
    for v in values:
        rows, own = v.shape
        if own != channels or not v.is_cpu or (rows != 1 and rows != sum(number_of_segments(xs, segments))):
            raise RuntimeError(
                f"expected statistics, weight and bias of {sum(number_of_segments(xs, segments))} x {channels} "
                f"channels on the CPU, as the input, got {tuple(v.shape)} on {v.device}"
            )
        if v.dtype != dtype or not v.is_contiguous() or not is_in_memory(v):
            v = v.detach().to(dtype).contiguous().resolve_neg()
        kept.append(v)
        found.append(Values(v.data_ptr(), channels if rows > 1 else 0))
    return kept, found


def _tables(xs: Sequence[Tensor], segments: Segments) -> tuple[Tensor, Tensor]:
    """Two numbers of each segment and channel."""
    shape, dtype = (sum(number_of_segments(xs, segments)), xs[0].shape[1]), accumulate_dtype(xs[0])
    return torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)


def _in_layout(grads: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients in the dtype and the memory format of the tensors."""
    pairs = zip(grads, xs, strict=True)
    return [
        grad
        if grad.dtype == x.dtype and grad.stride() == x.stride() and is_in_memory(grad)
        else torch.empty_like(x).copy_(grad)
        for grad, x in pairs
    ]
