"""The reference: operations of torch, differentiable to any order, on any device and layout, under any transform.

The same functions as `native` and `triton` have. Autograd differentiates the first two; the others are for layers whose
ranks share collectives, and may have other backends.

A *segment* is a run of consecutive samples of one tensor whose moments are taken together: one sample, a group of
samples, or all of them. `segments` has the numbers of samples of each tensor's segments, or None for one sample each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .moments import accumulate_dtype
from .partition import Segments


def moments(xs: Sequence[Tensor], segments: Segments) -> tuple[Tensor, Tensor]:
    """The mean and the biased variance of each segment and channel; 0 where a segment has no elements.

    Shape:
        - xs: each `(N_i, C, *)`
        - mean and var: `(S, C)`, float64 for float64, else float32
    """
    parts = [_moments(*run) for x, sizes in zip(xs, segments, strict=True) for run in _equal_runs(x, sizes)]
    if len(parts) == 1:
        return parts[0]
    means, variances = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(variances)


def affine(xs: Sequence[Tensor], segments: Segments, scale: Tensor, center: Tensor, shift: Tensor) -> list[Tensor]:
    """`scale · (x - center) + shift`, in the dtype of each tensor.

    Near its center neither a segment nor the gradients of it cancel as those of `scale · x + shift` would.

    Shape:
        - scale, center, shift: `(S, C)`, or `(1, C)` or `(C,)` for all segments
    """
    numbers = number_of_segments(xs, segments)
    parts = [_split(v, numbers) for v in (scale, center, shift)]
    return [_affine(x, a, c, b, sizes) for x, a, c, b, sizes in zip(xs, *parts, segments, strict=True)]


def sums(grads: Sequence[Tensor], xs: Sequence[Tensor], segments: Segments, center: Tensor) -> tuple[Tensor, Tensor]:
    """Σ grad and Σ grad · (x - center) of each segment and channel, `(S, C)`."""
    centers = _split(center, number_of_segments(xs, segments))
    totals: list[Tensor] = []
    products: list[Tensor] = []
    for grad, x, own, sizes in zip(grads, xs, centers, segments, strict=True):
        wide = grad.to(accumulate_dtype(x))
        product = wide * (x - _per_sample(own, sizes, x.ndim))
        for values, found in ((wide, totals), (product, products)):
            rows = values.sum(tuple(range(2, x.ndim))) if x.ndim > 2 else values
            found.append(rows if sizes is None else torch.stack([v.sum(0) for v in rows.split(list(sizes))]))
    return torch.cat(totals), torch.cat(products)


def gradient(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    segments: Segments,
    scale: Tensor,
    center: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> list[Tensor]:
    """`scale · grad + slope · (x - center) + offset`, in the dtype of each tensor."""
    wide = [[v.to(accumulate_dtype(x)) for v, x in zip(values, xs, strict=True)] for values in (grads, xs)]
    zero = torch.zeros_like(center)
    pairs = zip(
        affine(wide[0], segments, scale, zero, zero), affine(wide[1], segments, slope, center, offset), strict=True
    )
    return [(first + second).to(x.dtype) for (first, second), x in zip(pairs, xs, strict=True)]


def number_of_segments(xs: Sequence[Tensor], segments: Segments) -> list[int]:
    """How many segments each tensor has."""
    return [x.shape[0] if sizes is None else len(sizes) for x, sizes in zip(xs, segments, strict=True)]


def _equal_runs(x: Tensor, sizes: Sequence[int] | None) -> list[tuple[Tensor, int, int]]:
    """`x` in parts `(G · n, C, *)` of G segments of n samples, with n and G."""
    if sizes is None or not sizes:
        return [(x, 1, x.shape[0])]
    if _are_equal(sizes):
        return [(x, sizes[0], len(sizes))]
    return [(part, size, 1) for part, size in zip(x.split(list(sizes)), sizes, strict=True)]


def _moments(x: Tensor, samples: int, number: int) -> tuple[Tensor, Tensor]:
    x, channels = x.to(accumulate_dtype(x)), x.shape[1]
    if samples == 0 or 0 in x.shape[2:]:
        zeros = x.new_zeros(number, channels)
        return zeros, zeros
    if samples == 1:
        dims: tuple[int, ...] = tuple(range(2, x.ndim))
    elif samples == x.shape[0]:
        dims = (0, *range(2, x.ndim))
    else:
        x = x.unflatten(0, (-1, samples))
        dims = (1, *range(3, x.ndim))
    if not dims:  # one element in each
        return x, torch.zeros_like(x)
    mean = x.mean(dims, keepdim=True)
    var = (x - mean).square().mean(dims, keepdim=True)  # two passes: stable at any mean
    return mean.reshape(-1, channels), var.reshape(-1, channels)


def _affine(x: Tensor, scale: Tensor, center: Tensor, shift: Tensor, sizes: Sequence[int] | None) -> Tensor:
    scale, center, shift = (_per_sample(v, sizes, x.ndim) for v in (scale, center, shift))
    y = torch.addcmul(shift, x - center, scale)
    return y if y.dtype == x.dtype else y.to(x.dtype)  # torch 2.11 compiles a .to() without effect to no gradient


def _split(values: Tensor, numbers: Sequence[int]) -> Sequence[Tensor]:
    """The part of each tensor of values `(S, C)`; all of other values."""
    if len(numbers) == 1 or values.ndim == 1 or values.shape[0] != sum(numbers):
        return [values] * len(numbers)
    return values.split(list(numbers))


def _per_sample(values: Tensor, sizes: Sequence[int] | None, ndim: int) -> Tensor:
    """Values `(S, C)`, `(1, C)` or `(C,)` of segments of so many samples, as what broadcasts against `(N, C, *)`."""
    if sizes is not None and values.ndim == 2 and values.shape[0] > 1:
        if _are_equal(sizes):
            values = values if sizes[0] == 1 else values.repeat_interleave(sizes[0], 0)
        else:
            parts = zip(values.split(1), sizes, strict=True)
            values = torch.cat([value.expand(size, -1) for value, size in parts])
    return values[(..., *[None] * (ndim - 2))]


def _are_equal(sizes: Sequence[int]) -> bool:
    return all(size == sizes[0] for size in sizes)
