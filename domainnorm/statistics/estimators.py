"""Estimators of the population statistics of one layer, from the moments of its batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed import Group, all_reduce_sum, world_size
from ..layers import DomainBatchNorm
from ..ops.moments import Moments

Layer = nn.modules.batchnorm._BatchNorm  # torch's or, as they are subclasses of it, ours
# count (K, 1), mean, unbiased variance and the biased one of all samples together (K, C), in float64
Estimate = tuple[Tensor, Tensor, Tensor, Tensor]


class Pooled:
    """Eq. 2: the moments of the union."""

    def __init__(self, layer: Layer) -> None:
        self.shared = is_shared(layer)
        self.total: Moments = _zeros(layer)

    def add(self, moments: Moments) -> None:
        self.total = self.total + (moments.merge(0) if self.shared else moments)

    def finish(self) -> Estimate:
        total = self.total.merge_ranks(None) if world_size() > 1 else self.total
        return total.count, total.mean, total.unbiased_var(), total.var


class MeanOfVariances:
    """Eq. 3: the mean of means and the mean of unbiased variances."""

    def __init__(self, layer: Layer) -> None:
        self.shared = is_shared(layer)
        self.group = ranks_of(layer)
        zeros = _zeros(layer)
        self.sums = torch.cat([zeros.count, zeros.count, zeros.mean, zeros.var], dim=1)  # (K, 2 + 2C)
        self.pooled = Pooled(layer)  # for the variance of all samples together

    def add(self, moments: Moments) -> None:
        self.pooled.add(moments)
        if self.group is not None:
            moments = moments.merge_ranks(self.group[0])
        some, several = moments.count > 0, moments.count > 1  # one element has a mean, but no unbiased variance
        parts = (some.to(moments.mean), several.to(moments.mean), moments.mean * some, moments.unbiased_var() * several)
        new = torch.cat(parts, dim=1)
        self.sums += new.sum(0, keepdim=True) if self.shared else new

    def finish(self) -> Estimate:
        sums = all_reduce_sum(self.sums)
        means, variances, mean, var = sums.split([1, 1, *[(sums.shape[1] - 2) // 2] * 2], dim=1)
        # `write` takes a variance from two elements on
        count = means.clamp(max=1) + variances.clamp(max=1)
        return count, mean / means.clamp(min=1), var / variances.clamp(min=1), self.pooled.finish()[3]


def _buffers(layer: Layer) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None and layer.running_var is not None  # as `_follows_batches` sees to
    return layer.running_mean, layer.running_var


def is_shared(layer: Layer) -> bool:
    """Whether all domains have the same statistics."""
    return _buffers(layer)[0].ndim == 1


def _zeros(layer: Layer) -> Moments:
    mean = _buffers(layer)[0]
    zeros = torch.zeros_like(mean, dtype=torch.float64).reshape(-1, mean.shape[-1])
    return Moments(zeros[:, :1], zeros, zeros)


def write(layer: Layer, count: Tensor, mean: Tensor, var: Tensor, total_var: Tensor) -> None:
    """Count `(K, 1)`, mean and variances `(K, C)` into the buffers; those of a domain without elements stay.

    As does the variance of a domain of one element.
    """
    buffers = (*_buffers(layer), getattr(layer, "running_total_var", None))
    for buffer, value, fewest in zip(buffers, (mean, var, total_var), (1, 2, 2), strict=True):
        if buffer is not None:
            buffer.copy_(torch.where(count >= fewest, value, buffer.reshape(value.shape)).view_as(buffer))


def ranks_of(layer: Layer) -> tuple[Group] | None:
    """The process group over which a layer is synchronized, in a tuple: the group of all ranks is None."""
    if world_size() == 1:
        return None
    if isinstance(layer, DomainBatchNorm):
        return (None if layer.sync is True else layer.sync,) if layer.sync else None
    return (layer.process_group,) if isinstance(layer, nn.SyncBatchNorm) else None
