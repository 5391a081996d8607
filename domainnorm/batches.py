"""Whole normalization batches: moments, merge and affine in one call, where nothing comes between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from .kernels import compiled_batches as kernel
from .kernels.compiled_batches import Batches, Tables
from .moments import Moments

Affine = tuple[Tensor | None, Tensor | None]  # γ and β, `(C,)` or of each row `(ΣN, C)`


def of_rows(batches: Batches, value: Moments) -> Moments:
    """Of what is of groups, `(groups, C)`, what broadcasts against `(ΣN, C)`."""
    return value if len(batches.counts) == 1 else value[torch.tensor(batches.group)]


def batch_moments(batches: Batches, tables: Tables) -> tuple[Tensor, Sequence[int]]:
    """Means and variances of each batch, `(2, groups, C / width)`, and of how many numbers."""
    return tables[min(len(tables) - 1, 1)], [count * batches.width for count in batches.counts]


def counted(batches: Batches, tables: Tables) -> tuple[Tensor, Sequence[int]]:
    """The same of each channel, `(2, groups, C)`, or together `(2, 1, C)`."""
    return tables[0], [sum(batches.counts)] if batches.together else batches.counts


def read(xs: Sequence[Tensor], batches: Batches) -> Tables:
    """The moments that `normalize` needs, without a gradient."""
    with torch.no_grad():
        return kernel.read(xs, batches)


def normalize(
    xs: Sequence[Tensor],
    batches: Batches,
    affine: Affine,
    eps: float,
    reference: Callable[[Sequence[Tensor], Affine], list[Tensor]],
    tables: Tables | None = None,
) -> tuple[list[Tensor], Tables]:
    """Each batch normalized, then the affine; and the moments, without a gradient.

    Args:
        reference: the same of given tensors and affine, in differentiable operations, for double backward.
        tables: what `read` gave; None: each batch is read here, while it stays in the processor's cache.
    """
    kept: list[Tensor] = []
    ys = _Normalize.apply(batches, eps, reference, tables, kept, *affine, *xs)
    return list(ys), tuple(kept)


class _Normalize(Function):
    """γ, β and tensors -> what is normalized; the moments go to `kept`."""

    @staticmethod
    def forward(ctx, batches, eps, reference, tables, kept, weight, bias, *xs):
        ys, tables = kernel.normalize(xs, batches, weight, bias, eps, tables)
        kept.extend(tables)
        ctx.save_for_backward(weight, bias, *xs)
        ctx.batches, ctx.eps, ctx.reference, ctx.tables = batches, eps, reference, tables
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grads):
        weight, bias, *xs = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return *[None] * 5, *_differentiable(ctx.reference, weight, bias, xs, grads)
        dxs, to_weight, to_bias = kernel.gradient(grads, xs, ctx.batches, weight, bias, ctx.eps, ctx.tables)
        return None, None, None, None, None, like(to_weight, weight), like(to_bias, bias), *dxs


def like(grad: Tensor, of: Tensor | None) -> Tensor | None:
    """The gradient of γ or β, `(C,)` or of rows, from that of channels, or of rows where the other one is of rows."""
    if of is None:
        return None
    if grad.shape != of.shape:
        grad = (grad if grad.numel() == of.numel() else grad.sum(0)).view(of.shape)
    return grad if grad.dtype == of.dtype else grad.to(of.dtype)


def _differentiable(reference, weight, bias, xs, grads):
    """The gradients of γ, β and `xs`, with a graph of their own."""
    with torch.enable_grad():
        ys = reference(xs, (weight, bias))
    of = [v for v in (weight, bias, *xs) if v is not None and v.requires_grad]
    found = iter(torch.autograd.grad(ys, of, grads, create_graph=True))
    return [next(found) if v is not None and v.requires_grad else None for v in (weight, bias, *xs)]
