"""The samples of a batch in groups that are normalized apart."""

from __future__ import annotations

import torch
from torch import Tensor

from ..moments import Moments
from .domains import DomainBatch


class Split:
    """How the samples of each domain are split into groups, in order.

    The last group is the smaller one; if it has one element only, it joins the group before.

    Args:
        option: the layer's name for `size` or `number`, for messages.
        size: samples of a group. Or:
        number: as many groups of ⌈N / number⌉ samples as N samples make.
        allow_smaller_batch: whether training takes fewer samples than one group (or than `number`) as they are.

    Raises:
        ValueError: a size or number below 1.
    """

    def __init__(
        self, option: str, *, size: int | None = None, number: int | None = None, allow_smaller_batch: bool = False
    ) -> None:
        self.least = size if size is not None else (number or 0)
        if self.least < 1:
            raise ValueError(f"{option} takes a positive number, got {self.least}")
        self.option = option
        self.size = size
        self.number = number
        self.allow_smaller_batch = allow_smaller_batch

    def check_size(self, batch: DomainBatch, shared: bool) -> None:
        """ValueError if a domain, or with `shared` statistics all of them, has too few samples; none at all pass."""
        if self.allow_smaller_batch:
            return
        counts = [len(x) for x in batch.tensors]
        if not shared and self._is_mixed(batch) and not torch.compiler.is_compiling():
            counts = batch.ids().bincount(minlength=batch.num_domains).tolist()
        counts = [max(counts)] if shared else counts
        if small := [count for count in counts if 0 < count < self.least]:
            raise ValueError(
                f"{self.option}={self.least} needs {self.least} samples or more on this rank, of each domain that has "
                f"any: got {small[0]}; make it smaller or the batch larger, or set allow_smaller_batch"
            )

    def check_elements(self, batch: DomainBatch, shared: bool) -> None:
        """ValueError if a group has one element, and so no variance."""
        if self._is_mixed(batch):
            # the counts are on the device, but come in whole rows
            single = min(batch.elements) == 1 and bool((self._merge_mixed(batch, shared).count == 1).any())
        else:
            sizes: dict[tuple[int, int], int] = {}
            for k, (x, elements) in enumerate(zip(batch.tensors, batch.elements, strict=True)):
                full, size, rest = self._lengths(len(x), elements)
                for g, length in enumerate([size] * full + [rest]):
                    key = (0 if shared else k, g)
                    sizes[key] = sizes.get(key, 0) + length * elements
            single = 1 in sizes.values()
        if single:
            raise ValueError(
                "expected more than 1 value per channel in training, got 1 in a group of samples: "
                "use larger groups or a larger input, or statistics='population'"
            )

    def _is_mixed(self, batch: DomainBatch) -> bool:
        """Whether the samples of a domain are not one tensor of their own."""
        known = [domain for domain in batch.domains if isinstance(domain, int)]
        return len(set(known)) < len(batch.domains)

    def merge(self, batch: DomainBatch, shared: bool) -> Moments:
        """Of each sample `(ΣN, …)` the moments of its group.

        Args:
            shared: whether the g-th groups of all domains are one normalization batch.
        """
        if self._is_mixed(batch):
            return self._merge_mixed(batch, shared)
        if len(batch.tensors) == 1:
            full, size, rest = self._lengths(len(batch.tensors[0]), batch.elements[0])
            if full and not rest:
                return batch.counted.merge_blocks(size, 1)
        parts = batch.counted.split([len(x) for x in batch.tensors])
        ends = [self._lengths(len(of.mean), elements) for of, elements in zip(parts, batch.elements, strict=True)]
        groups = [_merge_lengths(of, lengths) for of, lengths in zip(parts, ends, strict=True)]  # (G_k, C)
        if shared and len(groups) > 1:
            longest = max(len(of.mean) for of in groups)
            padded = [_pad(of, longest) for of in groups]
            stacked = Moments(*(torch.stack([getattr(p, n) for p in padded]) for n in ("count", "mean", "var")))
            total = stacked.merge(0)[0]  # (G, C)
            groups = [total[: len(of.mean)] for of in groups]
        return Moments.cat([_spread(of, lengths) for of, lengths in zip(groups, ends, strict=True)])

    def sizes(self, count: int, elements: int) -> list[int]:
        """Of each group of `count` samples, which bring so many elements each."""
        full, size, rest = self._lengths(count, elements)
        return [size] * full + [rest] * (rest > 0)

    def _lengths(self, count: int, elements: int) -> tuple[int, int, int]:
        """(number of equal groups, samples of each, samples of the last other one) of `count` samples."""
        size = self.size or max(-(-count // (self.number or 1)), 1)
        full, rest = divmod(count, size)
        if (rest or size) * elements == 1 and count > size:
            full, rest = (full - 1, rest + size) if rest else (full - 2, 2 * size)
        return full, size, rest

    def _merge_mixed(self, batch: DomainBatch, shared: bool) -> Moments:
        """As if each domain's samples, in order, were a tensor of their own; nothing waits for a GPU."""
        ids = batch.ids()
        member = torch.nn.functional.one_hot(ids, batch.num_domains)  # (N, K)
        place = (member.cumsum(0) * member).sum(1) - 1  # of a sample in its domain
        count = member.sum(0)[ids]  # samples of its domain
        if self.size is not None:
            size, most = torch.full_like(count, self.size), -(-len(ids) // self.size)
        else:
            assert self.number is not None
            size, most = (count + self.number - 1) // self.number, self.number
        last = (count - 1) // size
        if min(batch.elements) == 1:
            last = last - (((count - 1) % size == 0) & (count > size)).long()
        group = torch.minimum(place // size, last)
        key = group if shared else ids * most + group
        merged = batch.counted.merge_by(key, max(most, 1) * (1 if shared else batch.num_domains))
        return merged[key]


def _merge_lengths(rows: Moments, lengths: tuple[int, int, int]) -> Moments:
    """`(N, C)` -> `(G, C)`."""
    full, size, rest = lengths
    end = full * size
    groups = []
    if full or not rest:
        equal = Moments(*(v[:end].unflatten(0, (full, size)) for v in (rows[:].count, rows.mean, rows.var)))
        merged = equal.merge(1)
        groups.append(Moments(merged.count[:, 0], merged.mean[:, 0], merged.var[:, 0]))
    if rest:
        groups.append(rows[end:].merge(0))
    return Moments.cat(groups)


def _spread(groups: Moments, lengths: tuple[int, int, int]) -> Moments:
    """`(G, C)` -> `(N, C)`."""
    full, size, rest = lengths

    def spread(v: Tensor) -> Tensor:
        equal = v[:full].repeat_interleave(size, 0)
        return torch.cat([equal, v[full:].expand(rest, v.shape[1])]) if rest else equal

    return Moments(*(spread(v) for v in (groups.count, groups.mean, groups.var)))


def _pad(groups: Moments, length: int) -> Moments:
    """With empty groups at the end."""
    missing = (0, 0, 0, length - len(groups.mean))
    return Moments(*(torch.nn.functional.pad(v, missing) for v in (groups.count, groups.mean, groups.var)))
