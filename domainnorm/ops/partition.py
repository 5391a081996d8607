"""Which segments of a batch form a set: those of a domain, or a group of samples that is normalized together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .moments import Moments, sum_by

Segments = Sequence[Sequence[int] | None]  # the numbers of samples of each tensor's segments; None: one sample each


class Partition:
    """Sets of segments.

    Args:
        num_sets: how many sets there are; some may be empty.
        runs: `(set, number of segments)` of runs of neighboring segments, where they are known on the host. Or:
        ids: LongTensor `(S,)`, the set of each segment, on the device of the input.
    """

    def __init__(self, num_sets: int, runs: Sequence[tuple[int, int]] | None = None, ids: Tensor | None = None) -> None:
        self.num_sets = num_sets
        self.ids = ids
        self.runs = runs or ()
        in_order = ids is None and [k for k, _ in self.runs] == list(range(num_sets))
        # segments of every set, where all sets have as many and lie one after the other; else 0
        self.size = self.runs[0][1] if in_order and all(n == self.runs[0][1] for _, n in self.runs) else 0

    def merge(self, moments: Moments) -> Moments:
        """The moments `(S, C)` of segments merged to those of the sets, `(num_sets, C)`."""
        if self.num_sets == 1:
            return moments.merge(0)
        if self.size:
            return moments.merge_neighbors(self.size)
        if self.ids is not None:
            return moments.merge_by(self.ids, self.num_sets)
        parts = moments.split([n for _, n in self.runs])
        sets: list[list[Moments]] = [[] for _ in range(self.num_sets)]
        for (k, _), part in zip(self.runs, parts, strict=True):
            sets[k].append(part)
        return Moments.cat([Moments.cat(own or [moments[:0]]).merge(0) for own in sets])

    def spread(self, values: Tensor) -> Tensor:
        """Values `(num_sets, C)` of sets as those of segments, `(S, C)`, or `(1, C)` where there is one set."""
        if self.num_sets == 1 or self.size == 1:
            return values
        if self.size:
            return values.repeat_interleave(self.size, 0)
        if self.ids is not None:
            return values[self.ids]
        return torch.cat([values[k : k + 1].expand(n, -1) for k, n in self.runs])

    def sum(self, values: Tensor) -> Tensor:
        """The sums `(…, num_sets, C)` of values `(…, S, C)` of segments."""
        if self.num_sets == 1:
            return values.sum(-2, keepdim=True)
        if self.size:
            return values if self.size == 1 else values.unflatten(-2, (-1, self.size)).sum(-2)
        if self.ids is not None:
            return sum_by(values, self.ids, self.num_sets, dim=-2)
        parts = values.split([n for _, n in self.runs], -2)
        sets = [values[..., :0, :].sum(-2)] * self.num_sets
        for (k, _), part in zip(self.runs, parts, strict=True):
            sets[k] = sets[k] + part.sum(-2)
        return torch.stack(sets, -2)

    def refined(self, sizes: Sequence[int]) -> Partition:
        """The same sets, where each segment is split into so many."""
        if self.ids is not None:
            return self
        left, runs = iter(sizes), []
        for k, number in self.runs:
            runs.append((k, sum(next(left) for _ in range(number))))
        return Partition(self.num_sets, runs)
