"""GroupNorm, then GhostBN, or the other way round; then one affine."""

from __future__ import annotations

from typing import Any, ClassVar

from .ghost import GhostBatchNorm
from .renamed import renamed_arguments


class SeqNorm(GhostBatchNorm):
    """GroupNorm over channel groups without affine, then GhostBN over sample groups (*Ghost Normalization*, §2.1).

    In inference, the GroupNorm still uses the sample and the GhostBN the population statistics. These are statistics of
    the group-normalized features or, with `group_norm_first=False` (§3.3), of the input. Both parts are computed from
    the moments of the samples, for which the input is read once.

    Args:
        num_features: number of channels, C.
        num_channel_groups: number of groups of the GroupNorm; divides C.
        num_sample_groups: number of groups of the GhostBN, of ⌈N / num_sample_groups⌉ samples each.
        group_norm_first: False: the GhostBN comes first.
        **options: of `GhostBatchNorm`.

    Shape:
        - Input: `(N, C, *)`, or a list of such tensors
        - Output: same as the input

    Raises:
        ValueError: `num_channel_groups` does not divide C.

    Example::

        >>> norm = dn.SeqNorm(16, num_channel_groups=4, num_sample_groups=8)
        >>> norm(torch.randn(16, 16, 8, 8)).shape
        torch.Size([16, 16, 8, 8])
    """

    is_channel_affine = False
    _renamed: ClassVar = {"channel_groups": "num_channel_groups", "batch_groups": "num_sample_groups"}

    @renamed_arguments(_renamed)
    def __init__(
        self,
        num_features: int,
        *,
        num_channel_groups: int,
        num_sample_groups: int,
        group_norm_first: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(num_features, num_sample_groups=num_sample_groups, **options)
        check_channel_groups(num_channel_groups, num_features)
        self.num_channel_groups = num_channel_groups
        self.group_norm_first = group_norm_first
        channels = num_features // num_channel_groups
        if group_norm_first:
            self.channels_per_first_group = channels
        else:
            self.channels_per_last_group = channels

    def grouping(self) -> str:
        text = f"num_channel_groups={self.num_channel_groups}, num_sample_groups={self.num_sample_groups}"
        return text if self.group_norm_first else f"{text}, group_norm_first=False"


def check_channel_groups(groups: int, channels: int) -> None:
    """ValueError if `groups` does not divide `channels`."""
    if groups < 1 or channels % groups:
        raise ValueError(
            f"num_channel_groups takes a divisor of num_features={channels}, got {groups}; the largest below it is "
            f"{max(g for g in range(1, channels + 1) if channels % g == 0 and g <= max(groups, 1))}"
        )
