"""BatchNorm over groups of samples."""

from __future__ import annotations

from typing import Any, ClassVar

from .domain_batch_norm import DomainBatchNorm
from .renamed import renamed_arguments
from .sample_groups import SampleGroups


class GhostBatchNorm(DomainBatchNorm):
    """BatchNorm that, in training, normalizes groups of samples apart (*Four Things*, §3.2; *Ghost Normalization*, §2).

    The samples of each domain are split, in order, into groups. Each group is a normalization batch of its own. The
    last group may be smaller; if it has only one element, it joins the group before. The population statistics, and so
    inference, are those of `nn.BatchNorm2d`, pooled over the groups of the whole batch. Gradient accumulation and
    unsynchronized processes do the same to a BatchNorm; here the groups are chosen.

    With several domains and shared SGD statistics, the g-th groups of all domains form one normalization batch.

    Args:
        num_features: number of channels, C.
        samples_per_group: number of samples in a group; or
        num_sample_groups: number of groups, of ⌈N / num_sample_groups⌉ samples each.
        allow_smaller_batch: whether training accepts a batch, or a domain's part of it, with fewer samples than one
            group (or than `num_sample_groups`): for inputs whose number of samples varies, such as RoIs. Otherwise this
            is a ValueError. Inference under minibatch statistics always accepts it.
        **options: of `DomainBatchNorm`, except `sync`: groups are within one rank.

    Shape:
        - Input: `(N, C, *)`, or a list of such tensors
        - Output: same as the input

    Raises:
        ValueError: not exactly one of `samples_per_group` and `num_sample_groups` is given, or `sync` is; from the
            call: the batch is too small.

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
