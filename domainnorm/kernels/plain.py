"""The reference: a few tensor operations each, on any device, layout and type."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def moments(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each row, `(ΣN, C)`: float64 of float64, else float32. 0 of a row of none."""
    return _table([_moments(x) for x in xs])


def affine(xs: Sequence[Tensor], scale: Tensor, centre: Tensor, shift: Tensor) -> list[Tensor]:
    """`scale · (x - centre) + shift`, in the type and memory format of each tensor.

    The numbers are `(ΣN, C)`, `(1, C)` or `(C,)`.
    """
    return [_affine(x, *numbers) for x, *numbers in _of_tensors(xs, scale, centre, shift)]


def sums(grads: Sequence[Tensor], xs: Sequence[Tensor], centre: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row, `(ΣN, C)`, Σ grad and Σ grad · (x - centre)."""
    return _table([_sums(grad, *of) for grad, of in zip(grads, _of_tensors(xs, centre), strict=True)])


def scaled(grads: Sequence[Tensor], xs: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """`scale · grad`, in the type of each tensor."""
    parts = zip(grads, _of_tensors(xs, scale), strict=True)
    return [(grad.to(of.dtype) * _per_row(of, x)).to(x.dtype) for grad, (x, of) in parts]


def gradient(
    grads: Sequence[Tensor] | None,
    xs: Sequence[Tensor],
    scale: Tensor | None,
    centre: Tensor,
    to_mean: Tensor,
    to_var: Tensor,
) -> list[Tensor]:
    """`scale · grad`, if there are any, and what comes through a row's moments, in the type of each tensor.

    That is `(to_mean + 2 · to_var · (x - centre)) / L`, of the gradients of its mean, the centre, and its variance.
    """
    if grads is None or scale is None:
        return [_through_moments(x, *of).to(x.dtype) for x, *of in _of_tensors(xs, centre, to_mean, to_var)]
    parts = zip(grads, _of_tensors(xs, scale, centre, to_mean, to_var), strict=True)
    return [
        torch.addcmul(_through_moments(x, *of), grad.to(a.dtype), _per_row(a, x)).to(x.dtype)
        for grad, (x, a, *of) in parts
    ]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.ndim == 2 or math.prod(x.shape[2:]) == 0:  # rows of one element, or of none
        mean = wide.clone() if x.ndim == 2 else wide.new_zeros(x.shape[:2])
        return mean, torch.zeros_like(mean)
    mean = wide.mean(_spatial(x))
    return mean, (wide - _per_row(mean, x)).square_().mean(_spatial(x))  # two passes: stable at any mean


def _affine(x: Tensor, scale: Tensor, centre: Tensor, shift: Tensor) -> Tensor:
    y = torch.addcmul(_per_row(shift, x), x - _per_row(centre, x), _per_row(scale, x))
    return y if y.dtype == x.dtype else y.to(x.dtype)  # torch 2.11 compiles a .to() without effect to no gradient


def _sums(grad: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    wide = grad.to(centre.dtype)
    return _sum(wide), _sum((x - _per_row(centre, x)).mul_(wide))


def _through_moments(x: Tensor, centre: Tensor, to_mean: Tensor, to_var: Tensor) -> Tensor:
    length = max(math.prod(x.shape[2:]), 1)
    slope, offset = (_per_row(v, x) for v in (to_var * (2 / length), to_mean / length))
    return torch.addcmul(offset, x - _per_row(centre, x), slope)


def _of_tensors(xs: Sequence[Tensor], *numbers: Tensor) -> Iterator[Any]:
    """Each tensor `(N_i, C, *)` with its part of numbers `(ΣN, C)`, or with all of others."""
    sizes = [x.shape[0] for x in xs]
    whole = (len(xs) == 1 or v.ndim == 1 or v.shape[0] != sum(sizes) for v in numbers)
    parts = ([v] * len(xs) if one else v.split(sizes) for v, one in zip(numbers, whole, strict=True))
    return zip(xs, *parts, strict=True)


def _table(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pairs of `(N_i, C)` of each tensor -> a pair of `(ΣN, C)`."""
    if len(parts) == 1:
        return parts[0]
    first, second = zip(*parts, strict=True)
    return torch.cat(first), torch.cat(second)


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def _per_row(value: Tensor, x: Tensor) -> Tensor:
    """`(N, C)` or `(C,)` as something that broadcasts against `x`."""
    return value[(..., *[None] * (x.ndim - 2))]


def _sum(x: Tensor) -> Tensor:
    return x.sum(_spatial(x)) if x.ndim > 2 else x
