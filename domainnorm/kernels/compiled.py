"""On a CPU: what `plain` computes, in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import plain
from .library import Running, Weighing, call, in_layout_of, keeping, move, numbers, parts, wide


def moments(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """As `plain.moments`, in one pass over each tensor."""
    mean, var = _empty_tables(xs)
    call("moments", xs, parts(xs), mean.data_ptr(), var.data_ptr())
    return mean, var


def affine(xs: Sequence[Tensor], scale: Tensor, centre: Tensor, shift: Tensor) -> list[Tensor]:
    """As `plain.affine`, in one pass."""
    ys = [torch.empty_like(x) for x in xs]
    call("affine", xs, parts(xs, ys), *(numbers(v, xs) for v in (scale, centre, shift)))
    return ys


def sums(grads: Sequence[Tensor], xs: Sequence[Tensor], centre: Tensor) -> tuple[Tensor, Tensor]:
    """As `plain.sums`, in one pass."""
    total, products = _empty_tables(xs)
    grads = [in_layout_of(grad, x) for grad, x in zip(grads, xs, strict=True)]
    call("sums", xs, parts(xs, grads=grads), total.data_ptr(), products.data_ptr(), numbers(centre, xs))
    return total, products


def gradient(
    grads: Sequence[Tensor] | None,
    xs: Sequence[Tensor],
    scale: Tensor | None,
    centre: Tensor,
    to_mean: Tensor,
    to_var: Tensor,
) -> list[Tensor]:
    """As `plain.gradient`, in one pass."""
    if grads is None or scale is None:
        return plain.gradient(grads, xs, scale, centre, to_mean, to_var)
    outs = [torch.empty_like(x) for x in xs]
    grads = [in_layout_of(grad, x) for grad, x in zip(grads, xs, strict=True)]
    call("gradient", xs, parts(xs, outs, grads), *(numbers(v, xs) for v in (scale, centre, to_mean, to_var)))
    return outs


def weighed(
    xs: Sequence[Tensor],
    share: float,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """Each row normalized by the union of its own moments, with weight `share`, and given ones; then the affine.

    The numbers are `(C,)` or `(ΣN, C)`. A layer's merge of rows is the reference.
    """
    ys = [torch.empty_like(x) for x in xs]
    by = keeping(Weighing, share, eps, *(numbers(v, xs) for v in (mean, var, weight, bias)))
    call("weighed", xs, parts(xs, ys), by)
    return ys


def ema(
    table: Tensor,
    counts: Sequence[int],
    running: tuple[Tensor, Tensor, Tensor],
    momentum: float | None,
    eps: float | None,
) -> None:
    """One step of running means, variances and step counts `(C,)` or `(K, C)` for each of some sets.

    Args:
        table: means and variances `(2, sets, C)`.
        counts: of each set.
        momentum: None: the cumulative average.
        eps: None, or what is averaged is `sqrt(var + eps)`.
    """
    mean, var, tracked = (v.data_ptr() for v in running)
    momentum = -1.0 if momentum is None else momentum
    of = Running(mean, var, tracked, running[0].ndim == 2, momentum, eps is not None, eps or 0.0)
    move(counts, table, of)
    increment_version(running)


def _empty_tables(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    shape = (sum(map(len, xs)), xs[0].shape[1])
    return torch.empty(shape, dtype=wide(xs[0])), torch.empty(shape, dtype=wide(xs[0]))
