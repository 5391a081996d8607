"""The reference: a few tensor operations each, on any device, layout and type."""

import math

import torch
from torch import Tensor


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each row, `(N, C)`: float64 of float64, else float32. 0 of a row of none."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.ndim == 2 or math.prod(x.shape[2:]) == 0:  # rows of one element, or of none
        mean = wide.clone() if x.ndim == 2 else wide.new_zeros(x.shape[:2])
        return mean, torch.zeros_like(mean)
    mean = wide.mean(_spatial(x))
    return mean, (wide - _per_row(mean, x)).square_().mean(_spatial(x))  # two passes: stable at any mean


def affine(x: Tensor, scale: Tensor, centre: Tensor, shift: Tensor) -> Tensor:
    """`scale · (x - centre) + shift`, in the type and memory format of `x`; numbers `(N, C)`, `(1, C)` or `(C,)`."""
    scale, centre, shift = (_per_row(v, x) for v in (scale, centre, shift))
    y = torch.addcmul(shift, x - centre, scale)
    return y if y.dtype == x.dtype else y.to(x.dtype)  # torch 2.11 compiles a .to() without effect to no gradient


def sums(grad: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row, `(N, C)`, Σ grad and Σ grad · (x - centre)."""
    wide = grad.to(centre.dtype)
    return _sum(wide), _sum((x - _per_row(centre, x)).mul_(wide))


def scaled(grad: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """`scale · grad`, in the type of `x`."""
    return (grad.to(scale.dtype) * _per_row(scale, x)).to(x.dtype)


def gradient(
    grad: Tensor | None, x: Tensor, scale: Tensor | None, centre: Tensor, to_mean: Tensor, to_var: Tensor
) -> Tensor:
    """`scale · grad`, if there are any, and what comes through a row's moments, in the type of `x`.

    That is `(to_mean + 2 · to_var · (x - centre)) / L`, of the gradients of its mean, the centre, and its variance.
    """
    length = max(math.prod(x.shape[2:]), 1)
    slope, offset = (_per_row(v, x) for v in (to_var * (2 / length), to_mean / length))
    out = torch.addcmul(offset, x - _per_row(centre, x), slope)
    if grad is not None and scale is not None:
        out = torch.addcmul(out, grad.to(scale.dtype), _per_row(scale, x))
    return out.to(x.dtype)


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def _per_row(value: Tensor, x: Tensor) -> Tensor:
    """`(N, C)` or `(C,)` as something that broadcasts against `x`."""
    return value[(..., *[None] * (x.ndim - 2))]


def _sum(x: Tensor) -> Tensor:
    return x.sum(_spatial(x)) if x.ndim > 2 else x
