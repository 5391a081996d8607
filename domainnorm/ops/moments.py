"""Count, mean and variance of sets of numbers, and their merge: the value that every normalization is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..distributed.collectives import Group, all_gather_stack, all_reduce_sum


@dataclass(frozen=True)
class Moments:
    """Count, mean and biased variance of sets of numbers, elementwise.

    Merging is associative, with count 0 (mean 0, variance 0) as its identity. It never computes `E[x²] - E[x]²`, so
    that large means cost no precision (Chan et al.). Every method is differentiable, to any order and under the
    transforms of `torch.func`, except `merge_ranks`, which has a first derivative only.

    Args:
        count: floating point; broadcasts against `mean`. A dimension of size 1 where `mean` has more means equal
            counts.
        mean: any shape, such as `(S, C)` for S sets in each of C channels.
        var: biased (divided by the count); same shape as `mean`.

    Example::

        >>> x = torch.randn(4, 16, 8, 8)
        >>> moments = dn.Moments.rows(x).merge(0)  # (1, 16): of each channel
        >>> torch.allclose(moments.unbiased_var(), x.var((0, 2, 3)))
        True
    """

    count: Tensor
    mean: Tensor
    var: Tensor

    @staticmethod
    def rows(x: Tensor) -> Moments:
        """Compute the moments of each row of `x`, one per sample and channel.

        Shape:
            - x: `(N, C, *)`
            - mean and var: `(N, C)`; count: `(N, 1)`
        """
        from .eager import moments

        mean, var = moments([x], [None])
        return Moments(mean.new_full((x.shape[0], 1), math.prod(x.shape[2:])), mean, var)

    @staticmethod
    def cat(parts: Sequence[Moments]) -> Moments:
        """Concatenate the sets of all `parts` along dimension 0."""
        if len(parts) == 1:
            return parts[0]
        return Moments(*(torch.cat(values) for values in zip(*(part._tensors() for part in parts), strict=True)))

    def split(self, sizes: Sequence[int]) -> list[Moments]:
        """Split along dimension 0: the reverse of `cat`."""
        if len(sizes) == 1:
            return [self]
        return [Moments(*values) for values in zip(*(v.split(list(sizes)) for v in self._tensors()), strict=True)]

    def __getitem__(self, index: int | slice | Tensor) -> Moments:
        """Select sets by their index along dimension 0."""
        return Moments(*(v[index] for v in self._tensors()))

    def __add__(self, other: Moments) -> Moments:
        """The union of two sets, elementwise."""
        stacked = zip(self._tensors(), other._tensors(), strict=True)
        return Moments(*(torch.stack(pair) for pair in stacked)).merge(0)[0]

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and variance, with a count for each set along dimension 0."""
        return self.count.expand(self.mean.shape[0], *self.count.shape[1:]), self.mean, self.var

    def merge(self, dim: int) -> Moments:
        """Merge the sets along `dim`, which is kept with size 1."""
        if self.count.shape[dim] < self.mean.shape[dim]:  # equal counts
            mean = self.mean.mean(dim, keepdim=True)
            var = (self.var + (self.mean - mean).square()).mean(dim, keepdim=True)
            return Moments(self.count * self.mean.shape[dim], mean, var)
        if self.mean.shape[dim] == 1:
            return self
        count = self.count.sum(dim, keepdim=True)
        weight = self.count / count.clamp(min=1)
        mean = (weight * self.mean).sum(dim, keepdim=True)
        return Moments(count, mean, (weight * (self.var + (self.mean - mean).square())).sum(dim, keepdim=True))

    def merge_neighbors(self, size: int) -> Moments:
        """Merge every `size` neighboring sets along dimension 0: `(S, C)` -> `(S / size, C)`."""
        if size == 1:
            return self
        blocks = Moments(*(v.unflatten(0, (-1, size)) for v in self._tensors())).merge(1)
        return Moments(blocks.count.squeeze(1), blocks.mean.squeeze(1), blocks.var.squeeze(1))

    def merge_by(self, ids: Tensor, num_sets: int) -> Moments:
        """Merge the sets that have the same id.

        Args:
            ids: LongTensor `(S,)` of numbers in `[0, num_sets)`, one for each set along dimension 0.

        Returns:
            Moments of size `num_sets` along dimension 0; an id that does not occur has count 0.
        """
        if num_sets == 1:
            return self.merge(0)
        count, mean, var = self._tensors()
        total = sum_by(count, ids, num_sets)
        weight = count / total.clamp(min=1)[ids]
        merged = sum_by(weight * mean, ids, num_sets)
        merged = merged + sum_by(weight * (mean - merged[ids]), ids, num_sets)  # what adding one by one has rounded off
        return Moments(total, merged, sum_by(weight * (var + (mean - merged[ids]).square()), ids, num_sets))

    def merge_channels(self, num_groups: int) -> Moments:
        """Merge neighboring channels, which have equal counts: `(S, C)` -> `(S, num_groups)`."""
        size = self.mean.shape[-1] // num_groups
        if size == 1:
            return self
        mean, var = (v.unflatten(-1, (num_groups, size)) for v in (self.mean, self.var))
        merged = Moments(self.count[..., None], mean, var).merge(mean.ndim - 1)
        return Moments(self.count * size, merged.mean.squeeze(-1), merged.var.squeeze(-1))

    def repeat_channels(self, times: int) -> Moments:
        """Repeat each channel `times` times in a row: `(S, C)` -> `(S, C · times)`."""
        if times == 1:
            return self
        return Moments(self.count, *(v.repeat_interleave(times, -1) for v in (self.mean, self.var)))

    def merge_ranks(self, group: Group) -> Moments:
        """Merge the sets of all ranks of a process group by their true counts (*Rethinking "Batch"*, App. A.6).

        It takes one all-gather in the forward pass, and one all-reduce of twice the channels in the backward pass.
        Every rank must call it, with or without elements, with the same shapes and dtypes.

        Shape:
            - count: `(K, 1)`; mean and var: `(K, C)`

        Raises:
            RuntimeError: in a second derivative.
        """
        mean = self.mean
        if torch.is_grad_enabled() and not mean.requires_grad:
            mean = mean.detach().requires_grad_()  # else this rank would miss the backward collective of the others
        return Moments(*_MergeRanks.apply(self._tensors()[0], mean, self.var, group))

    def double(self) -> Moments:
        """The same moments in float64."""
        return Moments(self.count.double(), self.mean.double(), self.var.double())

    def detach(self) -> Moments:
        """The same moments, detached from the graph."""
        return Moments(self.count.detach(), self.mean.detach(), self.var.detach())

    def unbiased_var(self) -> Tensor:
        """Variance with Bessel's correction `n / (n - 1)`; for sets of fewer than two elements, the biased variance."""
        return self.var * (self.count / (self.count - 1).clamp(min=1)).clamp(min=1)


class _MergeRanks(Function):
    """Moments of this rank -> of all ranks."""

    @staticmethod
    def forward(ctx: Any, count: Tensor, mean: Tensor, var: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        gathered = all_gather_stack(torch.cat([count, mean, var], dim=1), group)  # (W, K, 1 + 2C)
        merged = Moments(*gathered.split([1, mean.shape[1], mean.shape[1]], dim=2)).merge(0)[0]
        ctx.save_for_backward(count / merged.count.clamp(min=1), mean - merged.mean)
        ctx.mark_non_differentiable(merged.count)
        ctx.group = group
        return merged.count, merged.mean, merged.var

    @staticmethod
    def backward(ctx: Any, _: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, None]:
        if torch.is_grad_enabled():  # create_graph=True: second derivatives over ranks would be silently wrong
            raise RuntimeError("double backward is not implemented for moments merged over ranks: use sync=False")
        weight, delta = ctx.saved_tensors
        grad_mean, grad_var = all_reduce_sum(torch.stack(grads), ctx.group)
        return None, weight * (grad_mean + 2 * delta * grad_var), weight * grad_var, None


def sum_by(values: Tensor, ids: Tensor, num_sets: int, dim: int = 0) -> Tensor:
    """The sums of the values with the same id along `dim`, in time and memory of their number and of `num_sets`."""
    shape = list(values.shape)
    shape[dim] = num_sets
    return values.new_zeros(shape).index_add(dim, ids, values)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The type of the moments of `x`: float64 for float64, else float32, also under autocast."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """`x` in float32 or, if it is that, float64: for sums, scores and losses."""
    dtype = accumulate_dtype(x)
    return x if x.dtype == dtype else x.to(dtype)  # torch 2.11 compiles a .to() without effect to no gradient


def is_in_memory(x: Tensor) -> bool:
    """Whether the numbers at the address of `x` are its own: not where their sign is changed, or they are 0, lazily."""
    return torch.compiler.is_compiling() or not (x.is_neg() or x._is_zerotensor())
