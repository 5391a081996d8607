"""The samples of a batch in groups that are normalized apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.moments import sum_by
from ..ops.partition import Partition
from .inputs import LayerInput, Segmentation


class SampleGroups:
    """How the samples of each domain are split into groups, in order.

    The last group is the smaller one; if it has one element only, it joins the group before.

    Args:
        option: the layer's name for `size` or `number`, for messages.
        size: samples in a group. Or:
        number: as many groups of ⌈N / number⌉ samples as N samples make.
        allow_smaller_batch: whether training takes fewer samples than one group (or than `number`) as they are.

    Raises:
        ValueError: a size or number below 1.
    """

    def __init__(
        self, option: str, *, size: int | None = None, number: int | None = None, allow_smaller_batch: bool = False
    ) -> None:
        self.min_samples = size if size is not None else (number or 0)
        if self.min_samples < 1:
            raise ValueError(f"{option} takes a positive number, got {self.min_samples}")
        self.option = option
        self.size = size
        self.number = number
        self.allow_smaller_batch = allow_smaller_batch
        self.allow_single_element = False  # in a group of training: normalized, it is 0

    def segmentation(
        self, inputs: LayerInput, shared: bool, elements: Sequence[int], by_sample: bool = False
    ) -> Segmentation:
        """The groups of an input, each of which is a segment, or as many as it has samples.

        Args:
            shared: whether the g-th groups of all domains are one normalization batch.
            elements: that a sample of each tensor brings into a normalization batch.
        """
        if inputs.has_ids:
            ids = inputs.ids()
            domains = Partition(inputs.num_domains, ids=ids)
            return Segmentation([None] * len(inputs.tensors), domains, self._by_ids(ids, inputs, shared, elements))
        sizes = self._sizes(inputs, elements)
        first_group: dict[int | Tensor, int] = {}  # of each domain
        total = 0
        for known, own in sizes.items():
            first_group[known] = 0 if shared else total
            total = max(total, len(own)) if shared else total + len(own)
        left = {domain: [[g, size] for g, size in enumerate(own)] for domain, own in sizes.items()}
        segments: list[list[int] | None] = []
        domain_runs, group_runs = [], []
        for x, domain in zip(inputs.tensors, inputs.domains, strict=True):
            pieces = _take(left[int(domain)], x.shape[0]) or [(0, 0)]  # one segment, without samples
            segments.append(None if by_sample else [n for _, n in pieces])
            domain_runs.append((int(domain), x.shape[0] if by_sample else len(pieces)))
            group_runs += [(first_group[domain] + g, n if by_sample else 1) for g, n in pieces]
        return Segmentation(segments, Partition(inputs.num_domains, domain_runs), Partition(total, group_runs))

    def check(self, inputs: LayerInput, shared: bool, elements: Sequence[int]) -> None:
        """ValueError if a domain, or with `shared` all of them, has too few samples, or a group one element only."""
        if inputs.has_ids:
            if torch.compiler.is_compiling() or (self.allow_smaller_batch and min(elements) > 1):
                return  # without waiting for the device
            counts = inputs.ids().bincount(minlength=inputs.num_domains).tolist()
        else:
            samples: Counter[int] = Counter()
            for x, domain in zip(inputs.tensors, inputs.domains, strict=True):
                samples[int(domain)] += x.shape[0]
            counts = list(samples.values())
        counts = [max(counts)] if shared else counts
        if not self.allow_smaller_batch and (small := [n for n in counts if 0 < n < self.min_samples]):
            raise ValueError(
                f"{self.option}={self.min_samples} needs {self.min_samples} samples or more on this rank, of each "
                f"domain that has any: got {small[0]}; make it smaller or the batch larger, or set allow_smaller_batch"
            )
        if min(elements) > 1 or self.allow_single_element:
            return
        if inputs.has_ids:
            groups = self._by_ids(inputs.ids(), inputs, shared, elements)
            single = bool((groups.ids.bincount() == 1).any())  # type: ignore[union-attr]
        else:
            sizes = list(self._sizes(inputs, elements).values())
            if shared:
                longest = max(map(len, sizes))
                sizes = [[sum(own[g] for own in sizes if g < len(own)) for g in range(longest)]]
            single = 1 in (size for own in sizes for size in own)
        if single:
            raise ValueError(
                "expected more than 1 value per channel in training, got 1 in a group of samples: "
                "use larger groups or a larger input, or statistics='population'"
            )

    def _sizes(self, inputs: LayerInput, elements: Sequence[int]) -> dict[int, list[int]]:
        """The sizes of the groups of each domain that has a tensor."""
        samples: Counter[int] = Counter()
        for x, domain in zip(inputs.tensors, inputs.domains, strict=True):
            samples[int(domain)] += x.shape[0]
        return {domain: self._sizes_of(number, min(elements)) for domain, number in samples.items()}

    def _sizes_of(self, count: int, elements: int) -> list[int]:
        """The sizes of the groups of `count` samples, which bring so many elements each."""
        size = self.size or max(-(-count // (self.number or 1)), 1)
        full, rest = divmod(count, size)
        sizes = [size] * full + [rest] * (rest > 0) or [0]
        if len(sizes) > 1 and sizes[-1] * elements == 1:
            sizes[-2:] = [sizes[-2] + sizes[-1]]
        return sizes

    def _by_ids(self, ids: Tensor, inputs: LayerInput, shared: bool, elements: Sequence[int]) -> Partition:
        """As if each domain's samples, in order, were a tensor of their own; a GPU is not waited for."""
        num_domains = inputs.num_domains
        in_order, order = ids.sort(stable=True)
        first = torch.searchsorted(in_order, in_order)  # the first sample of the same domain, in this order
        numbers = torch.arange(len(ids), device=ids.device)
        first, place = (torch.empty_like(ids).scatter(0, order, v) for v in (first, numbers - first))  # of each sample
        count = sum_by(torch.ones_like(ids), ids, num_domains)[ids]  # samples of its domain
        if self.size is not None:
            size, max_groups = torch.full_like(count, self.size), -(-len(ids) // self.size)
        else:
            assert self.number is not None
            size, max_groups = (count + self.number - 1) // self.number, self.number
        last = (count - 1) // size
        if min(elements) == 1:
            last = last - (((count - 1) % size == 0) & (count > size)).long()
        group = torch.minimum(place // size, last)
        # a domain has no more groups than samples, so that its first sample's place numbers them apart from the others'
        return Partition(max(max_groups, 1), ids=group) if shared else Partition(max(len(ids), 1), ids=first + group)


def _take(groups: list[list[int]], samples: int) -> list[tuple[int, int]]:
    """`(group, samples)` of the next so many samples of a domain whose groups have so many left each."""
    taken = []
    while samples:
        number = min(groups[0][1], samples)
        taken.append((groups[0][0], number))
        samples -= number
        groups[0][1] -= number
        if not groups[0][1]:
            groups.pop(0)
    return taken
