"""The core: moments of rows, their merge, and the row-wise affine.

A *row* is one `(sample, channel)` pair of a feature map `(N, C, *)`. Every normalization of this library takes the
moments of each row once, merges the rows that form a normalization batch, and writes `y = a·x + b` row by row.

Moments are float64 for float64 inputs and float32 for all others, also under autocast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function

from .distributed import Group, all_gather_stack, all_reduce_sum


@dataclass(frozen=True)
class Moments:
    """Count, mean and biased variance of sets of numbers, elementwise; the value that every layer merges.

    Merging is associative, and a set with count 0 (mean 0, variance 0) is its identity. It never forms
    `E[x²] - E[x]²`, so large means cost no precision (Chan et al.). All of it is differentiable.

    Attributes:
        count: floating point, broadcasts against `mean`.
        mean: any shape; of `rows`, `(N, C)`.
        var: biased (divided by the count), shape of `mean`.
    """

    count: Tensor
    mean: Tensor
    var: Tensor

    @staticmethod
    def rows(x: Tensor) -> Moments:
        """Moments of each row of `x` `(N, C, *)`: mean and variance `(N, C)`, count `(N, 1)`."""
        mean, var = _RowMoments.apply(x)
        count = mean.new_full((x.shape[0], 1), math.prod(x.shape[2:]))
        return Moments(count, mean, var)

    @staticmethod
    def cat(parts: list[Moments], dim: int = 0) -> Moments:
        """The sets of all `parts`, side by side along `dim`."""
        return Moments(*(torch.cat([getattr(p, name) for p in parts], dim) for name in ("count", "mean", "var")))

    def merge(self, dim: int) -> Moments:
        """The union of the sets along `dim`, which is kept with size 1."""
        count = self.count.sum(dim, keepdim=True)
        share = self.count / count.clamp(min=1)
        mean = (share * self.mean).sum(dim, keepdim=True)
        var = (share * (self.var + (self.mean - mean).square())).sum(dim, keepdim=True)
        return Moments(count, mean, var)

    def merge_by(self, group: Tensor, num_groups: int) -> Moments:
        """The union of the sets of each group.

        Args:
            group: LongTensor `(R,)`, the group in `[0, num_groups)` of each of the R sets along dimension 0.

        Returns:
            Moments whose dimension 0 has size `num_groups`; a group without members has count 0.
        """
        if num_groups == 1:
            return self.merge(0)
        member = group == torch.arange(num_groups, device=group.device)[:, None]  # (G, R)
        member = member.view(*member.shape, *[1] * (self.mean.ndim - 1))  # (G, R, …)
        # Chosen, not multiplied by 0: a NaN of one group must not reach the others.
        parts = (torch.where(member, value, 0) for value in (self.count, self.mean, self.var))
        merged = Moments(*parts).merge(1)
        return Moments(merged.count.squeeze(1), merged.mean.squeeze(1), merged.var.squeeze(1))

    def merge_channels(self, num_groups: int) -> Moments:
        """The union of the sets of consecutive channels: `(…, C)` -> `(…, G)`. The channels have equal counts."""
        mean, var = (v.unflatten(-1, (num_groups, -1)) for v in (self.mean, self.var))
        merged = mean.mean(-1)
        var = (var + (mean - merged.unsqueeze(-1)).square()).mean(-1)
        return Moments(self.count * mean.shape[-1], merged, var)

    def repeat_channels(self, times: int) -> Moments:
        """Each channel `times` times in a row: `(…, G)` -> `(…, G · times)`."""
        return Moments(self.count, *(v.repeat_interleave(times, -1) for v in (self.mean, self.var)))

    def merge_ranks(self, group: Group) -> Moments:
        """The union of the sets of all ranks of a process group, by their true counts (App. A.6, A.10).

        One all-gather forward, one all-reduce of twice the channels backward. Count is `(K, 1)`, mean and variance
        are `(K, C)`, of the same shapes and dtypes on every rank; every rank must call it, empty or not.
        """
        mean = self.mean
        if torch.is_grad_enabled() and not mean.requires_grad:
            mean = mean.detach().requires_grad_()  # else this rank would miss the backward collective of the others
        return Moments(*_MergeRanks.apply(self.count, mean, self.var, group))

    def __add__(self, other: Moments) -> Moments:
        """The union of two sets, elementwise."""
        parts = (Moments(p.count[None], p.mean[None], p.var[None]) for p in (self, other))
        both = Moments.cat(list(parts)).merge(0)
        return Moments(both.count[0], both.mean[0], both.var[0])

    def __getitem__(self, index: int | slice | Tensor) -> Moments:
        """Some of the sets, by their index along dimension 0."""
        return Moments(self.count[index], self.mean[index], self.var[index])

    def unbiased_var(self) -> Tensor:
        """Variance with Bessel's correction `n / (n - 1)`; sets of fewer than two elements keep the biased one."""
        return self.var * (self.count / (self.count - 1).clamp(min=1)).clamp(min=1)


def normalize_rows(
    x: Tensor, rows: Moments, batch: Moments, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """`weight · (x - batch.mean) / sqrt(batch.var + eps) + bias`, row by row, in the dtype of `x`.

    Args:
        x: `(N, C, *)`.
        rows: the moments of its rows, `(N, C)`; they centre the arithmetic and change nothing else.
        batch: the moments of each row's normalization batch, broadcasting against `(N, C)`.
        weight, bias: broadcast against `(N, C)`; or None.
    """
    scale = (batch.var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    centre = rows.mean.detach()
    shift = (centre - batch.mean) * scale
    if bias is not None:
        shift = shift + bias
    return row_affine(x, scale.expand_as(centre), shift, centre)


def row_affine(x: Tensor, scale: Tensor, shift: Tensor, centre: Tensor) -> Tensor:
    """`scale · (x - centre) + shift` with one number per row, in the dtype and memory format of `x`.

    Args:
        x: `(N, C, *)`.
        scale, shift: `(N, C)`.
        centre: `(N, C)`, a constant to autograd; near the row's mean it keeps the sums of the backward pass exact
            where `scale · x + shift` would cancel.
    """
    return _RowAffine.apply(x, scale, shift, centre)


def is_recomputed() -> bool:
    """Whether activation checkpointing runs this forward again, within the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def _per_row(value: Tensor, x: Tensor) -> Tensor:
    """`(N, C)` as something that broadcasts against `x`."""
    return value.view(*value.shape, *[1] * (x.ndim - 2))


def _sum_rows(x: Tensor) -> Tensor:
    return x.sum(_spatial(x)) if x.ndim > 2 else x


class _RowMoments(Function):
    """(N, C, *) -> mean, biased variance (N, C)."""

    @staticmethod
    def forward(ctx, x):
        wide = x.to(_statistics_dtype(x))
        if x.ndim == 2 or math.prod(x.shape[2:]) == 0:  # rows of one element, or of none
            mean = wide.clone() if x.ndim == 2 else wide.new_zeros(x.shape[:2])
            var = torch.zeros_like(mean)
        else:
            mean = wide.mean(_spatial(x))
            var = (wide - _per_row(mean, x)).square_().mean(_spatial(x))  # two passes: stable at any mean
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        x, mean = ctx.saved_tensors
        count = max(math.prod(x.shape[2:]), 1)
        centred = x - _per_row(mean, x)
        grad = torch.addcmul(_per_row(grad_mean / count, x), centred, _per_row(grad_var * (2 / count), x))
        return grad.to(x.dtype)


class _RowAffine(Function):
    @staticmethod
    def forward(ctx, x, scale, shift, centre):
        ctx.save_for_backward(x, scale, centre)
        centred = x - _per_row(centre, x)
        y = torch.addcmul(_per_row(shift, x), centred, _per_row(scale, x))
        return y if y.dtype == x.dtype else y.to(x.dtype)  # torch 2.11 compiles a .to() without effect to no gradient

    @staticmethod
    def backward(ctx, grad):
        x, scale, centre = ctx.saved_tensors
        wide = grad.to(scale.dtype)
        grad_scale = _sum_rows((x - _per_row(centre, x)).mul_(wide))
        # No gradient for the centre: whoever builds `shift` from it makes y independent of it, to all orders.
        return (wide * _per_row(scale, x)).to(x.dtype), grad_scale, _sum_rows(wide), None


class _MergeRanks(Function):
    """Moments (K, 1), (K, C), (K, C) of this rank -> of all ranks."""

    @staticmethod
    def forward(ctx, count, mean, var, group):
        everyone = all_gather_stack(torch.cat([count, mean, var], dim=1), group)  # (W, K, 1 + 2C)
        merged = Moments(*everyone.split([1, mean.shape[1], mean.shape[1]], dim=2)).merge(0)
        total, total_mean, total_var = merged.count[0], merged.mean[0], merged.var[0]
        ctx.save_for_backward(count / total.clamp(min=1), mean - total_mean)
        ctx.mark_non_differentiable(total)
        ctx.group = group
        return total, total_mean, total_var

    @staticmethod
    def backward(ctx, _, grad_mean, grad_var):
        if torch.is_grad_enabled():  # create_graph=True: second derivatives over ranks would be silently wrong
            raise RuntimeError("double backward is not implemented for moments merged over ranks: use sync=False")
        share, offset = ctx.saved_tensors
        grad_mean, grad_var = all_reduce_sum(torch.stack([grad_mean, grad_var]), ctx.group)
        return None, share * (grad_mean + 2 * offset * grad_var), share * grad_var, None
