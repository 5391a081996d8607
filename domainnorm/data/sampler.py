"""Which samples form which batch: a pure function of the seed and the position, equal however a run is cut."""

from collections.abc import Iterator, Sequence

import numpy as np
from fvcore.common.config import CfgNode
from torch.utils.data import Sampler

# Names of the independent random streams that one seed starts.
_ORDER, _AUGMENTATION = 0, 1


class TrainingBatchSampler(Sampler[list[tuple[int, int]]]):
    """The infinite batches of one rank; each is a list of (index, augmentation seed).

    The global stream is one permutation of the data set after another; rank r takes its positions r,
    r + world_size, …, so in every epoch the ranks together take each index exactly once. With `group`, a rank sorts
    its samples into wide ones and others, and a batch is whatever group is full first.

    Args:
        sizes: (height, width) of each image.
        batch_size: images in one batch of this rank.
        seed: not negative; equal on all ranks.
        start: batches that an earlier run has had; they are replayed without loading anything.
        group: whether a batch holds one orientation only.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        group: bool = True,
    ) -> None:
        self.wide = [group and width > height for height, width in sizes]
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number, batch in enumerate(self._batches()):
            if number >= self.start:
                yield [(index, augmentation_seed(self.seed, position)) for index, position in batch]

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        groups: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        for index, position in self._stream():
            group = groups[self.wide[index]]
            group.append((index, position))
            if len(group) == self.batch_size:
                yield group.copy()
                group.clear()

    def _stream(self) -> Iterator[tuple[int, int]]:
        """(index, global position) of every sample of this rank."""
        count, position = len(self.wide), self.rank
        epoch, order = -1, np.zeros(0, dtype=np.int64)
        while True:
            if position // count != epoch:
                epoch = position // count
                order = np.random.default_rng([_ORDER, self.seed, epoch]).permutation(count)
            yield int(order[position % count]), position
            position += self.world_size


def images_per_forward(cfg: CfgNode, processes: int) -> int:
    """Images in one forward pass of training on one of `processes`: those that are learned from, then virtual ones."""
    return cfg.SOLVER.IMS_PER_BATCH // (cfg.SOLVER.ACCUMULATE * processes) + cfg.SOLVER.VIRTUAL_BATCH


def augmentation_seed(seed: int, position: int) -> int:
    """The seed (63 bits) of the augmentation of the sample at `position` of the global stream."""
    return int(np.random.SeedSequence([_AUGMENTATION, seed, position]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def evaluation_indices(count: int, rank: int, world_size: int) -> range:
    """This rank's part of `range(count)`: the parts are disjoint, in order, cover all and differ by at most one."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)
