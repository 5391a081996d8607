"""Batches of several data sets by ratios and domains: a pure function of the seed and the position, without replay."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from .sampler import augmentation_seed

# Names of the independent random streams that one seed starts; 0 to 3 are those of sampler.py and class_sampler.py.
_IMAGES, _SETS, _ORIENTATIONS, _DOMAINS = 4, 5, 6, 7


class SetBatchSampler(Sampler[list[tuple[int, int]]]):
    """The infinite batches of one rank; each is a list of (index, augmentation seed).

    A batch is `parts` normalization batches of `size` images, one after the other: those that it is split into for
    gradient accumulation. One is of one orientation and, by `composition`, of

    - "mixed": any domains;
    - "one_domain_per_rank": one domain, of its own; ranks exchange domains at random;
    - "one_domain_per_batch": the domain of all normalization batches of the step, on all ranks.

    Nothing is left to chance but the order: domains, orientations, data sets and images come in exact shares, in each
    cycle of the ratios and nearly so in each step. The images of a set come in one permutation after another.

    Args:
        wide: of each data set, whether each of its images is wide: bool (n,), n > 0. Indices count through all sets.
        size: images in one normalization batch.
        ratios: of each data set, above 0: how often its images come, relative to the others'.
        domains: of each data set, from 0.
        seed: not negative; equal on all ranks.
        start: batches that an earlier run has had.
    """

    def __init__(
        self,
        wide: Sequence[np.ndarray],
        size: int,
        *,
        ratios: Sequence[float],
        domains: Sequence[int],
        composition: str = "mixed",
        parts: int = 1,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        self.size = size
        self.per_step = composition == "one_domain_per_batch"
        self.parts = parts
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self.pools: list[np.ndarray] = []  # the images of one set and orientation
        weights: list[float] = []  # of each pool
        cells: dict[int, dict[bool, list[int]]] = {}  # the pools of each domain and orientation
        first = 0
        for of_set, ratio, domain in zip(wide, ratios, domains, strict=True):
            cell = cells.setdefault(0 if composition == "mixed" else domain, {})
            for orientation in (False, True):
                images = first + np.flatnonzero(of_set == orientation)
                if len(images):
                    cell.setdefault(orientation, []).append(len(self.pools))
                    self.pools.append(images)
                    weights.append(ratio * len(images) / len(of_set))
            first += len(of_set)
        self.cells = [[cell[key] for key in sorted(cell)] for _, cell in sorted(cells.items())]
        step = parts * world_size  # normalization batches of all ranks
        of_pools = [[[weights[pool] for pool in pools] for pools in domain] for domain in self.cells]
        of_cells = [[sum(pools) for pools in domain] for domain in of_pools]
        self.choose_domain = _Choices([sum(c) for c in of_cells], 1 if self.per_step else world_size, [_DOMAINS, seed])
        self.choose_cell = [_Choices(c, step, [_ORIENTATIONS, seed, d]) for d, c in enumerate(of_cells)]
        self.choose_pool = [
            [_Choices(pools, step * size, [_SETS, seed, d, c]) for c, pools in enumerate(domain)]
            for d, domain in enumerate(of_pools)
        ]
        self._order = functools.lru_cache(maxsize=2 * len(self.pools))(self._permutation)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in itertools.count(self.start):
            yield [sample for part in range(self.parts) for sample in self._normalization_batch(step, part)]

    def _normalization_batch(self, step: int, part: int) -> Iterator[tuple[int, int]]:
        place = part * self.world_size + self.rank
        if self.per_step:
            domain, number = self.choose_domain.at(step)
            number = number * self.parts * self.world_size + place
        else:
            domain, number = self.choose_domain.at(step * self.parts * self.world_size + place)
        cell, number = self.choose_cell[domain].at(number)
        chosen, times = self.choose_pool[domain][cell].between(number * self.size, (number + 1) * self.size)
        for choice, time in zip(chosen.tolist(), times.tolist(), strict=True):
            pool = self.cells[domain][cell][choice]
            epoch, place = divmod(time, len(self.pools[pool]))
            yield int(self._order(pool, epoch)[place]), augmentation_seed(self.seed, time * len(self.pools) + pool)

    def _permutation(self, pool: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([_IMAGES, self.seed, pool, epoch]).permutation(self.pools[pool])


class _Choices:
    """An infinite sequence of choices by `weights`, evenly spread, then shuffled within each `block` of it.

    `key` names the random stream of the shuffling.
    """

    def __init__(self, weights: Sequence[float], block: int, key: list[int]) -> None:
        self.shares = np.array(weights) / sum(weights)
        self.block = block
        self.key = key

    def at(self, position: int) -> tuple[int, int]:
        """The choice at `position`, and its number among the equal ones."""
        chosen, numbers = self.between(position, position + 1)
        return int(chosen[0]), int(numbers[0])

    def between(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The same of all positions from `start` to before `stop`: two of int64 (stop - start,)."""
        if len(self.shares) == 1:
            return np.zeros(stop - start, dtype=np.int64), np.arange(start, stop)
        blocks = range(start // self.block, -(-stop // self.block))
        first = blocks.start * self.block
        chosen, numbers = spread(self.shares, first, blocks.stop * self.block)
        orders = [
            b * self.block - first + np.random.default_rng([*self.key, b]).permutation(self.block) for b in blocks
        ]
        shuffled = chosen[np.concatenate(orders)]
        # Equal choices keep their order: an image comes again after all others of its set, and not earlier.
        in_order = np.empty_like(numbers)
        in_order[np.argsort(shuffled, kind="stable")] = numbers[np.argsort(chosen, kind="stable")]
        return shuffled[start - first : stop - first], in_order[start - first : stop - first]


def spread(shares: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Places `start` to `stop` of the sequence in which choice i has `shares[i]` of them, as evenly as can be.

    The k-th of choice i (from 0) is due at (k + 1/2) / share; they come in this order (Webster's method). So whole
    numbers of the sum L have their exact counts in each L places.

    Returns:
        The choice, and its number among the equal ones: two of int64 (stop - start,).
    """
    count = len(shares)  # before a time t there are t places, give or take count / 2
    low = np.maximum(np.floor((start - count) * shares) - 1, 0).astype(np.int64)
    high = np.ceil((stop + count) * shares).astype(np.int64) + 1
    chosen = np.repeat(np.arange(count), high - low)
    numbers = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
    kept = np.argsort((numbers + 0.5) / shares[chosen], kind="stable")[start - low.sum() : stop - low.sum()]
    return chosen[kept], numbers[kept]
