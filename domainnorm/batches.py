"""Whole normalization batches: moments, merge and affine in one call, where nothing comes between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function

from .kernels import compiled_batches as kernel
from .moments import Moments

Affine = tuple[Tensor | None, Tensor | None]  # γ and β, `(C,)` or of each row `(ΣN, C)`


@dataclass(frozen=True)
class Batches:
    """Which rows of tensors `(N_i, C, *)` are normalized together: samples of a group, by neighbouring channels.

    Attributes:
        group: LongTensor `(ΣN,)`, of each sample of all tensors, in [0, groups); None: all are of one.
        counts: `(groups, 1)`, the numbers that a channel has in each group.
        width: channels of a normalization batch; divides C.
        first: channels of a GroupNorm without affine that each sample passes before (SeqNorm; width is 1 then); 0: none.
    """

    group: Tensor | None
    counts: Tensor
    width: int = 1
    first: int = 0

    @property
    def groups(self) -> int:
        return len(self.counts)

    @property
    def batch_counts(self) -> Tensor:
        """`(groups, 1)`, the numbers that a normalization batch has in each group."""
        return self.counts if self.width == 1 else self.counts * self.width

    def of_rows(self, value: Moments) -> Moments:
        """Of what is of groups, `(groups, C)`, what broadcasts against `(ΣN, C)`."""
        return value if self.group is None else value[self.group]

    def counted(self, tables: kernel.Tables, channels: int) -> Moments:
        """The moments that population statistics of so many channels count: of channels, or of batches."""
        if tables[0].shape[1] == channels:
            return Moments(self.counts, *tables[:2])
        return Moments(self.batch_counts, *tables[2:4])


def read(xs: Sequence[Tensor], batches: Batches) -> kernel.Tables:
    """The moments that `normalize` needs, without a gradient."""
    with torch.no_grad():
        return kernel.read(xs, batches)


def normalize(
    xs: Sequence[Tensor],
    batches: Batches,
    affine: Affine,
    eps: float,
    reference: Callable[[Sequence[Tensor], Affine], list[Tensor]],
    tables: kernel.Tables | None = None,
) -> tuple[list[Tensor], kernel.Tables]:
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
        ctx.save_for_backward(weight, bias, *xs, *tables)
        ctx.batches, ctx.eps, ctx.reference, ctx.number = batches, eps, reference, len(xs)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grads):
        weight, bias, *tensors = ctx.saved_tensors
        xs, tables = tensors[: ctx.number], tuple(tensors[ctx.number :])
        if torch.is_grad_enabled():  # create_graph=True
            return *[None] * 5, *_differentiable(ctx.reference, weight, bias, xs, grads)
        dxs, *numbers = kernel.gradient(grads, xs, ctx.batches, weight, bias, ctx.eps, tables)
        numbers = (_like(grad, of) for grad, of in zip(numbers, (weight, bias), strict=True))
        return *[None] * 5, *numbers, *dxs


def _like(grad: Tensor, of: Tensor | None) -> Tensor | None:
    """The gradient of `(C,)` or `(ΣN, C)`, of what is of rows or groups."""
    if of is None:
        return None
    if of.shape != grad.shape:
        grad = grad[0] if len(grad) == 1 else grad.sum(0)
    return grad.view(of.shape).to(of.dtype)


def _differentiable(reference, weight, bias, xs, grads):
    """The gradients of γ, β and `xs`, with a graph of their own."""
    with torch.enable_grad():
        ys = reference(xs, (weight, bias))
    of = [v for v in (weight, bias, *xs) if v is not None and v.requires_grad]
    found = iter(torch.autograd.grad(ys, of, grads, create_graph=True))
    return [next(found) if v is not None and v.requires_grad else None for v in (weight, bias, *xs)]
