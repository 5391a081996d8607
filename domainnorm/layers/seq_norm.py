"""GroupNorm, then GhostBN, then one affine."""

from typing import Any

import torch
from torch import Tensor

from ..moments import Moments, Rows
from .ghost import GhostBatchNorm


class SeqNorm(GhostBatchNorm):
    """GroupNorm of `channel_groups` without affine, then GhostBN of `batch_groups` (*Ghost Normalization*, §2.1).

    In inference the first part still uses the sample, the second the population statistics, which are those of the
    group-normalized features. Both parts are computed from the moments of the rows: the input `(N, C, *)` is read for
    them once.

    Args:
        num_features: C.
        channel_groups: of the GroupNorm; divides C.
        batch_groups: of the GhostBN, groups of ⌈N / batch_groups⌉ samples.
        **options: of `GhostBatchNorm`.

    Raises:
        ValueError: `channel_groups` does not divide C.
    """

    per_channel = False

    def __init__(self, num_features: int, channel_groups: int, batch_groups: int, **options: Any) -> None:
        super().__init__(num_features, num_groups=batch_groups, option="batch_groups", **options)
        check_channel_groups(channel_groups, num_features)
        self.channel_groups = channel_groups
        self.channels_together = (1, num_features // channel_groups)
        self.batch_groups = batch_groups

    def _read(self, tensors: list[Tensor]) -> tuple[Rows, Moments]:
        rows = _GroupedRows(tensors, self.channel_groups, self.eps)
        of, scale = rows.moments, rows.scale
        return rows, Moments(of.count, (of.mean - rows.centre) * scale, of.var * scale.square())

    def _normalize_by(self, rows: Rows, of: Moments, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
        assert isinstance(rows, _GroupedRows)
        factor = (of.var + self.eps).rsqrt()
        if weight is not None:
            factor = factor * weight
        shift = -of.mean * factor if bias is None else bias - of.mean * factor
        return rows.affine(rows.scale * factor, rows.centre, shift)

    def _normalize_fixed(
        self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        rows, _ = self._read([x])
        mean, var = (v.to(rows.moments.mean.dtype) for v in (mean, var))
        return self._normalize_by(rows, Moments(torch.ones_like(mean), mean, var), weight, bias)[0]

    def grouping(self) -> str:
        return f"channel_groups={self.channel_groups}, batch_groups={self.batch_groups}"


class _GroupedRows(Rows):
    """Rows, and the mean and the factor that GroupNorm subtracts and multiplies, `(ΣN, C)` each."""

    def __init__(self, tensors: list[Tensor], groups: int, eps: float) -> None:
        super().__init__(tensors)
        group = self.moments.merge_blocks(1, self.moments.mean.shape[1] // groups)
        self.centre = group.mean
        self.scale = (group.var + eps).rsqrt()


def check_channel_groups(groups: int, channels: int) -> None:
    """ValueError if `groups` does not divide `channels`."""
    if groups < 1 or channels % groups:
        raise ValueError(
            f"channel_groups takes a divisor of num_features={channels}, got {groups}; the largest below it is "
            f"{max(g for g in range(1, channels + 1) if channels % g == 0 and g <= max(groups, 1))}"
        )
