"""Groups of samples and channels normalized together."""

from typing import Any

import torch
from torch import Tensor

from ..moments import Moments, Rows
from .ghost import GhostBatchNorm
from .seq_norm import check_channel_groups


class GroupedBatchNorm(GhostBatchNorm):
    """Statistics over `examples_per_group` samples × `C / channel_groups` channels (GBGN; *Four Things*, §3.4).

    It is GroupNorm with `examples_per_group=1`, and GhostBN with `channel_groups=C`. The population statistics are
    kept per channel; in inference those of a channel group are merged, and mixed with the sample's own by
    `example_weight`: with 1, inference is that of GroupNorm.

    Args:
        num_features: C.
        channel_groups: groups of channels; divides C.
        examples_per_group: samples in a group; a last group of fewer is used as it is.
        **options: of `GhostBatchNorm`.

    Raises:
        ValueError: `channel_groups` does not divide C.
    """

    per_channel = False

    def __init__(self, num_features: int, channel_groups: int, examples_per_group: int, **options: Any) -> None:
        options |= {"option": "examples_per_group", "allow_smaller_batch": True}
        super().__init__(num_features, group_size=examples_per_group, **options)
        check_channel_groups(channel_groups, num_features)
        self.channel_groups = channel_groups
        self.channels_together = (num_features // channel_groups, 0)
        self.examples_per_group = examples_per_group

    def _elements(self, x: Tensor) -> int:
        return super()._elements(x) * self.num_features // self.channel_groups

    def _normalize_by(self, rows: Rows, of: Moments, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
        return super()._normalize_by(rows, self._over_channels(of), weight, bias)

    def _normalize_fixed(
        self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        of = self._over_channels(Moments(torch.ones_like(mean), mean, var))
        return super()._normalize_fixed(x, of.mean, of.var, weight, bias)

    def _over_channels(self, of: Moments) -> Moments:
        return of.merge_blocks(1, self.num_features // self.channel_groups)

    def grouping(self) -> str:
        return f"channel_groups={self.channel_groups}, examples_per_group={self.examples_per_group}"
