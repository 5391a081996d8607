"""BatchNorm over groups of samples."""

from __future__ import annotations

from typing import Any, ClassVar

from .domain_batch_norm import DomainBatchNorm
from .renamed import renamed_arguments
from .sample_groups import SampleGroups


class GhostBatchNorm(DomainBatchNorm):
    """BatchNorm that, in training, normalizes groups of samples apart (*Four Things*, §3.2; *Ghost Normalization*, §2).

    The samples of each domain are split, in order, into groups; each group is a normalization batch per channel. A last
    group is smaller; of one element only, it joins the one before. The population statistics are those of
    `nn.BatchNorm2d`, of the whole batch pooled over its groups, and so is inference. It is what gradient accumulation
    and unsynchronized processes do to a BatchNorm, with chosen groups.

    With several domains and shared SGD statistics, the g-th groups of all domains are one normalization batch.

    Args:
        num_features: number of channels, C.
        samples_per_group: samples in a group; or
        num_sample_groups: groups of ⌈N / num_sample_groups⌉ samples.
        allow_smaller_batch: whether training takes a batch, or a domain's part of it, that is smaller than one group
            (or of fewer samples than groups) as it is: where the number of samples varies, as that of RoIs. Else it is
            a ValueError; in inference under minibatch statistics it never is.
        **options: of `DomainBatchNorm`; groups are of one rank, so not `sync`.

    Shape:
        - Input: `(N, C, *)`, or a list of such tensors
        - Output: as the input

    Raises:
        ValueError: not one of `samples_per_group` and `num_sample_groups`, or `sync`; from the call, too small a batch.

    Example::

        >>> bn = dn.GhostBatchNorm(16, samples_per_group=2)
        >>> y = bn(torch.randn(4, 16, 8, 8))  # samples 0 and 1, and samples 2 and 3, are normalized apart
        >>> bool(y[:2].mean().abs() < 1e-6)
        True
    """

    _renamed: ClassVar = {"group_size": "samples_per_group", "num_groups": "num_sample_groups"}

    @renamed_arguments(_renamed)
    def __init__(
        self,
        num_features: int,
        *,
        samples_per_group: int | None = None,
        num_sample_groups: int | None = None,
        allow_smaller_batch: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_features, **options)
        if self.sync:
            raise ValueError(f"{type(self).__name__} normalizes groups of one rank's samples: leave sync out")
        if (samples_per_group is None) == (num_sample_groups is None):
            given = {"samples_per_group": samples_per_group, "num_sample_groups": num_sample_groups}
            raise ValueError(f"expected one of samples_per_group and num_sample_groups, got {given}")
        self.sample_groups = SampleGroups(
            "num_sample_groups" if samples_per_group is None else "samples_per_group",
            size=samples_per_group,
            number=num_sample_groups,
            allow_smaller_batch=allow_smaller_batch,
        )
        self.samples_per_group = samples_per_group
        self.num_sample_groups = num_sample_groups

    def grouping(self) -> str:
        if self.samples_per_group is None:
            return f"num_sample_groups={self.num_sample_groups}"
        return f"samples_per_group={self.samples_per_group}"
