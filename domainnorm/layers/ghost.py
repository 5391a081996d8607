"""BatchNorm over groups of samples."""

from typing import Any

from .domain_batch_norm import DomainBatchNorm
from .split import Split


class GhostBatchNorm(DomainBatchNorm):
    """BatchNorm that, in training, normalizes groups of samples apart (*Four Things*, §3.2; *Ghost Normalization*, §2).

    The samples `(N, C, *)` of each domain are split, in order, into groups; each group is a normalization batch per
    channel. A last group is smaller; of one element only, it joins the one before. The population statistics are
    those of `nn.BatchNorm2d`, of the whole batch pooled over its groups, and so is inference. It is what gradient
    accumulation and unsynchronized processes do to a BatchNorm, with chosen groups.

    With several domains and shared SGD statistics, the g-th groups of all domains are one normalization batch.

    Args:
        num_features: C.
        group_size: samples in a group; or
        num_groups: groups of ⌈N / num_groups⌉ samples.
        allow_smaller_batch: whether training takes a batch, or a domain's part of it, that is smaller than one group
            (or of fewer samples than groups) as it is: where the number of samples varies, as that of RoIs. Else it is
            a ValueError; in inference under minibatch statistics it never is.
        option: what the groups are called in messages, where not by one of these.
        **options: of `DomainBatchNorm`; groups are of one rank, so not `sync`.

    Raises:
        ValueError: not one of `group_size` and `num_groups`, or `sync`.
    """

    plain = False

    def __init__(
        self,
        num_features: int,
        group_size: int | None = None,
        num_groups: int | None = None,
        *,
        allow_smaller_batch: bool = False,
        option: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, **options)
        if self.sync:
            raise ValueError(f"{type(self).__name__} normalizes groups of one rank's samples: leave sync out")
        given = {"group_size": group_size, "num_groups": num_groups}
        if (group_size is None) == (num_groups is None):
            raise ValueError(f"expected one of group_size and num_groups, got {given}")
        option = option or ("num_groups" if group_size is None else "group_size")
        self.split = Split(option, size=group_size, number=num_groups, allow_smaller_batch=allow_smaller_batch)
        self.group_size = group_size
        self.num_groups = num_groups

    def grouping(self) -> str:
        return f"num_groups={self.num_groups}" if self.group_size is None else f"group_size={self.group_size}"
