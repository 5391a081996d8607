"""Batches made by class: a pure function of the seed and the position, equal however a run is cut."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from ..errors import UserError
from .sampler import augmentation_seed

# Names of the independent random streams that one seed starts; 0 and 1 are those of sampler.py.
_CHOICE, _ORDER = 2, 3


class ClassBatchSampler(Sampler[list[tuple[int, int]]]):
    """The infinite batches of one rank; each is a list of (index, augmentation seed).

    A batch is `parts` normalization batches of `size` images, one after the other: those that it is split into for
    gradient accumulation. There is one global stream of normalization batches, and the ranks take batches of it in
    turn; so ranks share an image no sooner than one rank would repeat it. What is in one is said by `batches`:

    - "few_classes": `classes_per_batch` classes at random, equally many images of each, in random order (*Batch
      Renormalization*, §4.3; *Four Things*, Table 1);
    - "few_classes_in_rounds": the same images, but each `classes_per_batch` in turn hold one of each drawn class;
    - "class_disjoint_halves": the classes are split at random; each half of the images is drawn from one set of them.

    The images of a class come in one permutation of it after another, so they are used equally often. Within a
    normalization batch none comes twice unless its class has too few.

    Args:
        labels: of each image, not negative.
        size: images in one normalization batch.
        with_replacement: whether the classes of a normalization batch are drawn independently, as in both papers: one
            that is drawn twice has twice as many images. Else they are different.
        seed: not negative; equal on all ranks.
        start: batches that an earlier run has had; they are replayed without loading anything.

    Raises:
        UserError: `size` cannot be shared equally by the classes or halves, or there are too few classes.
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        size: int,
        *,
        batches: str,
        classes_per_batch: int = 0,
        with_replacement: bool = True,
        parts: int = 1,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        _, counts = np.unique(labels, return_counts=True)
        self.classes = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])  # the images of each
        self.size = size
        self.batches = batches
        self.classes_per_batch = classes_per_batch
        self.with_replacement = with_replacement
        self.parts = parts
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self._check()

    def _check(self) -> None:
        halves = self.batches == "class_disjoint_halves"
        ways, key = (2, "DATALOADER.BATCHES") if halves else (self.classes_per_batch, "DATALOADER.CLASSES_PER_BATCH")
        value = repr(self.batches) if halves else ways
        if ways < 1:
            raise UserError(f"{key} takes a positive number, got {ways}")
        if ways > len(self.classes) and (halves or not self.with_replacement):
            raise UserError(
                f"{key} {value} needs {ways} classes that have images, the data set has {len(self.classes)}; "
                "choose another one or another data set"
            )
        if self.size % ways:
            raise UserError(
                f"{key} {value} contradicts a normalization batch of {self.size} images (SOLVER.IMS_PER_BATCH over the "
                f"processes and SOLVER.ACCUMULATE, or in a test its own size): it must be a multiple of {ways}"
            )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        turn = self.parts * self.world_size  # normalization batches of all ranks in one step
        batch: list[tuple[int, int]] = []
        for number, images in enumerate(self._choices()):
            step, place = divmod(number, turn)
            if step < self.start or place // self.parts != self.rank:
                continue
            first = number * self.size
            batch += [
                (int(i), augmentation_seed(self.seed, first + k)) for k, i in enumerate(self._order(images, number))
            ]
            if len(batch) == self.parts * self.size:
                yield batch
                batch = []

    def _choices(self) -> Iterator[list[np.ndarray]]:
        """The images of each normalization batch of the global stream, a group for each class or half."""
        rng = np.random.default_rng([_CHOICE, self.seed])
        decks = [_Deck(indices, rng) for indices in self.classes]
        sizes = np.array([len(indices) for indices in self.classes])
        while True:
            if self.batches == "class_disjoint_halves":
                halves = np.array_split(rng.permutation(len(decks)), 2)
                rng.shuffle(halves)  # of an odd number of classes, either half may have one more
                yield [self._half(half, sizes[half], decks, rng) for half in halves]
            else:
                number = self.classes_per_batch
                chosen = (
                    rng.integers(len(decks), size=number)
                    if self.with_replacement
                    else rng.permutation(len(decks))[:number]
                )
                yield self._of_classes(chosen.tolist(), decks)

    def _of_classes(self, chosen: list[int], decks: "list[_Deck]") -> list[np.ndarray]:
        """The share of images of each chosen class, all different also where a class is chosen twice."""
        share = self.size // self.classes_per_batch
        drawn = {label: decks[label].draw(share * chosen.count(label)) for label in dict.fromkeys(chosen)}
        parts = {label: iter(np.split(images, chosen.count(label))) for label, images in drawn.items()}
        return [next(parts[label]) for label in chosen]

    def _half(self, half: np.ndarray, sizes: np.ndarray, decks: "list[_Deck]", rng: np.random.Generator) -> np.ndarray:
        """Half a normalization batch from the classes `half` of `sizes` images: of each as many as chance gives."""
        rounds, rest = divmod(self.size // 2, int(sizes.sum()))
        counts = rounds * sizes + rng.multivariate_hypergeometric(sizes, rest, method="marginals")
        return np.concatenate([decks[label].draw(count) for label, count in zip(half, counts, strict=True) if count])

    def _order(self, images: list[np.ndarray], number: int) -> np.ndarray:
        # Its own stream, so that rounds and random order have the same images, and replaying need not draw it.
        rng = np.random.default_rng([_ORDER, self.seed, number])
        if self.batches == "few_classes":
            return rng.permutation(np.concatenate(images))
        if self.batches == "few_classes_in_rounds":
            within = np.stack([rng.permutation(group) for group in images], axis=1)  # (round, class)
            return rng.permuted(within, axis=1).reshape(-1)
        return np.concatenate([rng.permutation(group) for group in images])


class _Deck:
    """The images of one class, dealt from one permutation after another."""

    def __init__(self, images: np.ndarray, rng: np.random.Generator) -> None:
        self.images = images
        self.rng = rng
        self.left = images[:0]

    def draw(self, count: int) -> np.ndarray:
        """The next `count` images: (count,), all different if there are as many, else each as often as possible."""
        rounds, count = divmod(count, len(self.images))
        drawn = self.left[:count]
        self.left = self.left[count:]
        if missing := count - len(drawn):
            deck = self.rng.permutation(self.images)
            again = np.isin(deck, drawn)
            deck = np.concatenate([deck[~again], deck[again]])  # what was just drawn is not drawn at once again
            drawn, self.left = np.concatenate([drawn, deck[:missing]]), deck[missing:]
        return np.concatenate([*[self.images] * rounds, drawn])
