"""Whole normalization batches: moments, merge and affine in one call, where nothing comes between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function

from .kernels import compiled
from .moments import Moments, Rows


@dataclass(frozen=True)
class Batches:
    """Which rows of tensors `(N_i, C, *)` are normalized together: samples of a group, by neighbouring channels.

    Attributes:
        group: LongTensor `(ΣN,)`, of each sample of all tensors, in [0, groups); None: all are of one.
        counts: `(groups, 1)`, the numbers that a channel has in each group.
        width: channels of a normalization batch; divides C.
    """

    group: Tensor | None
    counts: Tensor
    width: int = 1

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


@dataclass(frozen=True)
class BatchMoments:
    """What batches are normalized by, without a gradient.

    Attributes:
        channels: of each channel of each group, `(groups, C)`.
        batches: `(groups, C / width)`.
    """

    channels: Moments
    batches: Moments

    @staticmethod
    def of(batches: Batches, tables: compiled.Tables) -> BatchMoments:
        mean, var, *of_batches = tables
        channels = Moments(batches.counts, mean, var)
        return BatchMoments(channels, Moments(batches.batch_counts, *of_batches))


def read(xs: Sequence[Tensor], batches: Batches) -> BatchMoments:
    """The moments of the batches."""
    with torch.no_grad():
        return BatchMoments.of(batches, compiled.batch_moments(xs, batches))


def normalize(
    xs: Sequence[Tensor],
    batches: Batches,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    of: BatchMoments | None = None,
) -> tuple[list[Tensor], BatchMoments]:
    """Each batch normalized, then the affine; and the moments.

    Args:
        weight, bias: `(C,)`, or of each row `(ΣN, C)`; None: 1 and 0.
        of: what `read` gave of these; None: it is done here, while a batch is in the processor's cache.
    """
    known = None if of is None else (of.channels.mean, of.channels.var, of.batches.mean, of.batches.var)
    tables: list[Tensor] = []
    ys = _Normalize.apply(batches, eps, known, tables, weight, bias, *xs)
    mean, var, batch_mean, batch_var = tables
    return list(ys), of or BatchMoments.of(batches, (mean, var, batch_mean, batch_var))


def composed(
    xs: Sequence[Tensor], batches: Batches, weight: Tensor | None, bias: Tensor | None, eps: float
) -> list[Tensor]:
    """What `normalize` computes, row by row: the reference, differentiable to any order."""
    rows = Rows(xs)
    of = rows.moments.merge(0) if batches.group is None else rows.moments.merge_by(batches.group, batches.groups)
    if batches.width > 1:
        of = of.merge_blocks(1, batches.width)
    return rows.normalize(batches.of_rows(of), weight, bias, eps)


class _Normalize(Function):
    """γ, β and tensors -> what is normalized; `tables` gets the moments."""

    @staticmethod
    def forward(ctx, batches, eps, known, tables, weight, bias, *xs):
        ys, of = compiled.normalize(xs, batches, weight, bias, eps, known)
        tables.extend(of)
        ctx.save_for_backward(weight, bias, *of[2:], *xs)
        ctx.batches, ctx.eps = batches, eps
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grads):
        weight, bias, mean, var, *xs = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return None, None, None, None, *_differentiable(xs, ctx.batches, weight, bias, ctx.eps, grads)
        tables = (mean, var, mean, var)
        dxs, *affine = compiled.normalize_gradient(grads, xs, ctx.batches, weight, bias, ctx.eps, tables)
        numbers = (
            None if of is None else grad.sum_to_size(of.shape if of.ndim == 2 else (1, *of.shape)).view_as(of).to(of)
            for grad, of in zip(affine, (weight, bias), strict=True)
        )
        return None, None, None, None, *numbers, *dxs


def _differentiable(xs, batches, weight, bias, eps, grads):
    """The gradients of γ, β and `xs`, with a graph of their own."""
    with torch.enable_grad():
        ys = composed(xs, batches, weight, bias, eps)
    of = [v for v in (weight, bias, *xs) if v is not None and v.requires_grad]
    found = iter(torch.autograd.grad(ys, of, grads, create_graph=True))
    return [next(found) if v is not None and v.requires_grad else None for v in (weight, bias, *xs)]
