"""Groups of samples and channels normalized together."""

from __future__ import annotations

from typing import Any, ClassVar

from .ghost import GhostBatchNorm
from .renamed import renamed_arguments
from .seq_norm import check_channel_groups


class GroupedBatchNorm(GhostBatchNorm):
    """Normalization over `samples_per_group` samples and `C / num_channel_groups` channels (GBGN; *Four Things*, §3.4).

    With `samples_per_group=1` this is GroupNorm, with `num_channel_groups=C` GhostBN. The population statistics are
    kept per channel. Inference merges those of each channel group and mixes them with the sample's own by
    `example_weight`: with 1, inference is that of GroupNorm.

    Args:
        num_features: number of channels, C.
        num_channel_groups: number of channel groups; divides C.
        samples_per_group: number of samples in a group; a smaller last group is used as it is.
        **options: of `GhostBatchNorm`.

    Shape:
        - Input: `(N, C, *)`, or a list of such tensors
        - Output: same as the input

    Raises:
        ValueError: `num_channel_groups` does not divide C.

    Example::

        >>> x = torch.randn(4, 16, 8, 8)
        >>> norm = dn.GroupedBatchNorm(16, num_channel_groups=4, samples_per_group=1)
        >>> torch.allclose(norm(x), nn.GroupNorm(4, 16)(x), atol=1e-5)
        True
    """

    is_channel_affine = False
    _renamed: ClassVar = {"channel_groups": "num_channel_groups", "examples_per_group": "samples_per_group"}

    @renamed_arguments(_renamed)
    def __init__(self, num_features: int, *, num_channel_groups: int, samples_per_group: int, **options: Any) -> None:
        options.setdefault("allow_smaller_batch", True)
        super().__init__(num_features, samples_per_group=samples_per_group, **options)
        check_channel_groups(num_channel_groups, num_features)
        self.num_channel_groups = num_channel_groups
        self.channels_per_group = num_features // num_channel_groups

    def grouping(self) -> str:
        return f"num_channel_groups={self.num_channel_groups}, samples_per_group={self.samples_per_group}"
