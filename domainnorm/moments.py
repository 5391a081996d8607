"""The core: moments of rows, their merge, and the row-wise affine.

A *row* is one `(sample, channel)` pair of a feature map `(N, C, *)`. Every normalization of this library takes the
moments of each row once, merges the rows that form a normalization batch, and writes `y = a·x + b` row by row.

Moments are float64 for float64 inputs and float32 for all others, also under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function

from .distributed import Group
from .kernels import kernel, plain
from .merges import Merge, MergeBlocks, MergeRanks


@dataclass(frozen=True)
class Moments:
    """Count, mean and biased variance of sets of numbers, elementwise; the value that every layer merges.

    Merging is associative, and a set with count 0 (mean 0, variance 0) is its identity. It never forms
    `E[x²] - E[x]²`, so large means cost no precision (Chan et al.). All of it is differentiable.

    Attributes:
        count: floating point, broadcasts against `mean`; of size 1 where that has more, it is the same everywhere.
        mean: any shape; of `rows`, `(N, C)`.
        var: biased (divided by the count), shape of `mean`.
    """

    count: Tensor
    mean: Tensor
    var: Tensor

    @staticmethod
    def of(table: Tensor, counts: Sequence[float]) -> Moments:
        """Of means and variances `(2, R, C)` of so many numbers each."""
        return Moments(table.new_tensor(counts).unsqueeze_(1), *table.unbind())

    @staticmethod
    def rows(x: Tensor) -> Moments:
        """Moments of each row of `x` `(N, C, *)`: mean and variance `(N, C)`, count `(N, 1)`."""
        of = Rows([x]).moments
        return Moments(of._counts(0), of.mean, of.var)

    @staticmethod
    def cat(parts: list[Moments], dim: int = 0) -> Moments:
        """The sets of all `parts`, side by side along `dim`."""
        if len(parts) == 1:
            return parts[0]
        of = [(part._counts(dim), part.mean, part.var) for part in parts]
        return Moments(*(torch.cat(values, dim) for values in zip(*of, strict=True)))

    def split(self, sizes: list[int]) -> list[Moments]:
        """The reverse of `cat`: parts of these sizes along dimension 0."""
        if len(sizes) == 1:
            return [self]
        values = (self._counts(0), self.mean, self.var)
        return [Moments(*of) for of in zip(*(v.split(sizes) for v in values), strict=True)]

    def _counts(self, dim: int) -> Tensor:
        """One for each set along `dim`."""
        size = [-1] * self.count.ndim
        size[dim] = self.mean.shape[dim]
        return self.count.expand(size)

    def merge(self, dim: int) -> Moments:
        """The union of the sets along `dim`, which is kept with size 1."""
        if dim == 0 and self.mean.ndim == 2 and self.count.shape[0] < self.mean.shape[0]:
            number = self.mean.shape[0]
            return Moments(self.count * number, *MergeBlocks.apply(self.mean, self.var, number, 1, False))
        count = self.count.sum(dim, keepdim=True)
        share = self.count / count.clamp(min=1)
        return Moments(count, *Merge.apply(share, self.mean, self.var, dim))

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
        parts = (torch.where(member, value, 0) for value in (self._counts(0), self.mean, self.var))
        merged = Moments(*parts).merge(1)
        return Moments(merged.count.squeeze(1), merged.mean.squeeze(1), merged.var.squeeze(1))

    def merge_blocks(self, rows: int, channels: int) -> Moments:
        """Of each set the union of its block of equal counts: so many neighbours along R and along C of `(R, C)`.

        The numbers divide R and C; sets `(C,)` are one row.
        """
        merged = MergeBlocks.apply(self.mean, self.var, rows, channels, True)
        return Moments(self.count * (rows * channels), *(v.view(self.mean.shape) for v in merged))

    def merge_neighbours(self, number: int) -> Moments:
        """The union of so many consecutive sets of equal counts along R: `(R, C)` -> `(R / number, C)`."""
        counts = self._counts(0)[::number] * number
        return Moments(counts, *MergeBlocks.apply(self.mean, self.var, number, 1, False))

    def merge_channels(self, num_groups: int) -> Moments:
        """The union of the sets of consecutive channels: `(…, C)` -> `(…, G)`. The channels have equal counts."""
        size = self.mean.shape[-1] // num_groups
        merged = MergeBlocks.apply(self.mean, self.var, 1, size, False)
        return Moments(self.count * size, *(v.view(*self.mean.shape[:-1], num_groups) for v in merged))

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
        return Moments(*MergeRanks.apply(self.count, mean, self.var, group))

    def repeat_interleave(self, times: int, dim: int) -> Moments:
        """Each set so many times in a row along `dim`."""
        return Moments(*(v.repeat_interleave(times, dim) for v in (self._counts(dim), self.mean, self.var)))

    def __add__(self, other: Moments) -> Moments:
        """The union of two sets, elementwise."""
        parts = (Moments(p.count[None], p.mean[None], p.var[None]) for p in (self, other))
        both = Moments.cat(list(parts)).merge(0)
        return Moments(both.count[0], both.mean[0], both.var[0])

    def __getitem__(self, index: int | slice | Tensor) -> Moments:
        """Some of the sets, by their index along dimension 0."""
        return Moments(self._counts(0)[index], self.mean[index], self.var[index])

    def unbiased_var(self) -> Tensor:
        """Variance with Bessel's correction `n / (n - 1)`; sets of fewer than two elements keep the biased one."""
        return self.var * (self.count / (self.count - 1).clamp_(min=1)).clamp_(min=1)


class Rows:
    """Tensors `(N_i, C, *)` that are read once, for the moments of their rows, and written once, as affines of them.

    Attributes:
        tensors: with as many channels each.
        moments: of the rows of all tensors, one tensor after the other: mean and variance `(ΣN, C)`, count `(ΣN, 1)`,
            or `(1, 1)` of a single tensor.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        # A compiler joins what the two ends of the backward pass do, and sees through no side door.
        self._deferred = None if torch.compiler.is_compiling() else _Deferred()
        mean, var, *self._doors = _ReadRows.apply(self._deferred, *tensors)
        self._written = False
        one = len(tensors) == 1 and tensors[0].shape[0] > 0  # count for all rows
        counts = [mean.new_full((1 if one else x.shape[0], 1), math.prod(x.shape[2:])) for x in tensors]
        self.moments = Moments(counts[0] if one else torch.cat(counts), mean, var)

    def normalize(self, batch: Moments, weight: Tensor | None, bias: Tensor | None, eps: float) -> list[Tensor]:
        """`weight · (x - batch.mean) / sqrt(batch.var + eps) + bias`, row by row.

        Args:
            batch: the moments of each row's normalization batch; as `weight` and `bias`, if they are not None, it
                broadcasts against `(ΣN, C)`.
        """
        scale = (batch.var + eps).rsqrt()
        return self.affine(scale if weight is None else scale * weight, batch.mean, bias)

    def affine(self, scale: Tensor, centre: Tensor, shift: Tensor | None) -> list[Tensor]:
        """`scale · (x - centre) + shift`, row by row, in the types and memory formats of the tensors.

        Near its centre, neither a row nor the sums of its backward pass cancel as those of `scale · x + shift` would.

        Args:
            scale, centre, shift: `(ΣN, C)`, `(1, C)` or `(C,)`.

        Raises:
            RuntimeError: it is called again.
        """
        if self._written:
            raise RuntimeError("rows are written once: read the tensors again")
        self._written = True
        dtype = self.moments.mean.dtype
        shift = centre.new_zeros(centre.shape[-1:]) if shift is None else shift
        numbers = (v.to(dtype) for v in (scale, centre, shift))
        return list(_WriteRows.apply(self._deferred, *numbers, *self.tensors, *self._doors))


def is_recomputed() -> bool:
    """Whether activation checkpointing runs this forward again, within the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@dataclass
class _Deferred:
    """Of a backward pass: the scale by which the gradients of the tensors are still to be multiplied.

    `_WriteRows` knows the gradient through the affine, `_ReadRows` the one through the moments. The former leaves it
    to the latter to write both at once: through a side door, an output of `_ReadRows` that nobody else has, it hands
    on the gradient that it got, and here the scale.
    """

    scale: Tensor | None = None


class _ReadRows(Function):
    """Tensors -> mean, biased variance (ΣN, C), and with `deferred` the side door of each tensor."""

    @staticmethod
    def forward(ctx, deferred, *xs):
        ctx.set_materialize_grads(False)
        mean, var = kernel(xs).moments(xs)
        ctx.save_for_backward(mean, *xs)
        ctx.deferred = deferred
        return mean, var, *(() if deferred is None else (x.view_as(x) for x in xs))

    @staticmethod
    def backward(ctx, grad_mean, grad_var, *grads):
        mean, *xs = ctx.saved_tensors
        # The side doors may not be used in this backward pass. The scale is that of all of them: it stays for others,
        # which may run at the same time.
        scale = None if ctx.deferred is None or grads[0] is None else ctx.deferred.scale
        grad_mean, grad_var = (torch.zeros_like(mean) if g is None else g for g in (grad_mean, grad_var))
        return None, *kernel(xs).gradient(None if scale is None else grads, xs, scale, mean, grad_mean, grad_var)


class _WriteRows(Function):
    """Scale, centre and shift of rows, tensors, their side doors -> scale · (x - centre) + shift."""

    @staticmethod
    def forward(ctx, deferred, scale, centre, shift, *xs):
        xs = xs if deferred is None else xs[: len(xs) // 2]
        ctx.save_for_backward(scale, centre, *xs)
        ctx.deferred, ctx.shapes = deferred, (scale.shape, centre.shape, shift.shape)
        return tuple(kernel(xs).affine(xs, scale, centre, shift))

    @staticmethod
    def backward(ctx, *grads):
        scale, centre, *xs = ctx.saved_tensors
        total, products = kernel(xs).sums(grads, xs, centre)
        if max(map(math.prod, ctx.shapes)) < total.numel():  # they are not of rows, and the gradients not either
            total = total.sum(0, keepdim=True)
        to_centre = (scale * total).neg_()
        numbers = (None, *(v.sum_to_size(of) for v, of in zip((products, to_centre, total), ctx.shapes, strict=True)))
        none = (None,) * len(xs)
        if ctx.deferred is None:
            return *numbers, *plain.scaled(grads, xs, scale)
        if torch.is_grad_enabled():  # create_graph=True: what runs later must find this gradient where it belongs
            return *numbers, *plain.scaled(grads, xs, scale), *none
        ctx.deferred.scale = scale.detach()  # its graph leads to who keeps it: it would never be freed
        return *numbers, *none, *grads
