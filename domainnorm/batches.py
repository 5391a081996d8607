"""Whole normalization batches: moments, merge and affine in one call, where nothing comes between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .kernels import compiled_batches as kernel
from .kernels.compiled_batches import Batches, Tables, Towards

Affine = tuple[Tensor | None, Tensor | None]  # γ and β, `(C,)` or of each row `(ΣN, C)`
Reference = Callable[[Sequence[Tensor], Affine, Tables], list[Tensor]]


def of_rows(batches: Batches, value: Any) -> Any:
    """Of what is of groups, `(groups, C)`, what broadcasts against `(ΣN, C)`."""
    return value if len(batches.counts) == 1 else value[batches.ids]


def corrected(affine: Affine, r: Tensor, d: Tensor) -> Affine:
    """γ · r and γ · d + β."""
    weight, bias = affine
    if weight is not None:
        r, d = weight * r, weight * d
    return r, d if bias is None else d + bias


def batch_moments(batches: Batches, tables: Tables) -> tuple[Tensor, Sequence[int]]:
    """Means and variances of each batch, `(2, groups, C / width)`, and of how many numbers."""
    return tables.batches, [count * batches.width for count in batches.counts]


def counted(batches: Batches, tables: Tables) -> tuple[Tensor, Sequence[int]]:
    """The same of each channel, `(2, groups, C)`, or together `(2, 1, C)`."""
    return tables.counted, [sum(batches.counts)] if batches.together else batches.counts


def read(xs: Sequence[Tensor], batches: Batches) -> Tables:
    """The moments that `normalize` needs, without a gradient."""
    with torch.no_grad():
        return kernel.read(xs, batches)


def normalize(
    xs: Sequence[Tensor],
    batches: Batches,
    affine: Affine,
    eps: float,
    reference: Reference,
    towards: Towards | None = None,
) -> tuple[list[Tensor], Tables]:
    """Each batch normalized, corrected `towards` the population, then the affine; and the moments, without a gradient.

    Args:
        reference: the same of given tensors, affine and tables, in differentiable operations, for double backward.
    """
    kept: list[Tables] = []
    ys = _Normalize.apply(batches, eps, reference, towards, kept, *affine, *xs)
    return list(ys), kept[0]


class _Normalize(Function):
    """γ, β and tensors -> what is normalized; the moments go to `kept`."""

    @staticmethod
    def forward(ctx, batches, eps, reference, towards, kept, weight, bias, *xs):
        ys, tables = kernel.normalize(xs, batches, weight, bias, eps, towards)
        kept.append(tables)
        ctx.save_for_backward(weight, bias, *xs)
        ctx.batches, ctx.eps, ctx.reference, ctx.tables = batches, eps, reference, tables
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grads):
        weight, bias, *xs = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return *[None] * 5, *_differentiable(ctx.reference, weight, bias, xs, ctx.tables, grads)
        dxs, to_weight, to_bias = kernel.gradient(grads, xs, ctx.batches, weight, bias, ctx.eps, ctx.tables)
        return None, None, None, None, None, like(to_weight, weight), like(to_bias, bias), *dxs


def like(grad: Tensor, of: Tensor | None) -> Tensor | None:
    """The gradient of γ or β, `(C,)` or of rows, from that of channels, or of rows where the other one is of rows."""
    if of is None:
        return None
    if not of.numel():  # there are no rows
        return torch.zeros_like(of)
    if grad.shape != of.shape:
        grad = (grad if grad.numel() == of.numel() else grad.sum(0)).view(of.shape)
    return grad if grad.dtype == of.dtype else grad.to(of.dtype)


def _differentiable(reference, weight, bias, xs, tables, grads):
    """The gradients of γ, β and `xs`, with a graph of their own."""
    with torch.enable_grad():
        ys = reference(xs, (weight, bias), tables)
    of = [v for v in (weight, bias, *xs) if v is not None and v.requires_grad]
    found = iter(torch.autograd.grad(ys, of, grads, create_graph=True))
    return [next(found) if v is not None and v.requires_grad else None for v in (weight, bias, *xs)]
