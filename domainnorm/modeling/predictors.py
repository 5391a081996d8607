"""The layers of a model that have rows for each class, and these rows by the names of the classes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor


class ClassRows(NamedTuple):
    """How the rows of a weight and bias belong to classes: `repeats x (background + classes) x numbers`.

    Args:
        repeats: how often all classes come, one after the other: once for each anchor.
        background: 1 where a class of its own stands before the others, else 0.
        numbers: of each class, such as the 4 of a box.
    """

    repeats: int = 1
    background: int = 0
    numbers: int = 1

    def by_class(self, value: Tensor) -> Tensor:
        """`value` with these three dimensions instead of its first."""
        return value.unflatten(0, (self.repeats, -1, self.numbers))

    def num_classes(self, value: Tensor) -> int:
        """How many classes `value` has rows for, without background; 0 where it has none of this kind."""
        if not value.ndim or value.shape[0] % (self.repeats * self.numbers):
            return 0
        return value.shape[0] // (self.repeats * self.numbers) - self.background


Predictors = Mapping[str, ClassRows]  # by the name of the layer


def corresponding(names: Sequence[str], own_names: Sequence[str], number: int, own_number: int) -> list[int | None]:
    """For each of `own_number` classes which one of `number` others it is: that of its name; None: none of them.

    Classes after the named ones, and all where either have no names, are those of the same position if there are as
    many.
    """
    if not names or not own_names or len(names) > number:
        return list(range(number)) if number == own_number else [None] * own_number
    place = {name: k for k, name in enumerate(names)}
    rest = range(len(own_names), own_number)
    same = len(names) == len(own_names) and number == own_number
    return [*(place.get(name) for name in own_names), *(k if same else None for k in rest)]


def with_rows(rows: ClassRows, own: Tensor, other: Tensor, which: Sequence[int | None]) -> Tensor:
    """`own` with the rows of background, and of each class that `which` has a class of `other` for, from there."""
    old, new = rows.by_class(other), rows.by_class(own.clone())
    new[:, : rows.background] = old[:, : rows.background]
    for k, source in enumerate(which):
        if source is not None:
            new[:, rows.background + k] = old[:, rows.background + source]
    return new.flatten(0, 2)
