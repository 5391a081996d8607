"""The layers of a model that have rows for each class, and these rows by the names of the classes."""

from collections.abc import Iterator, Mapping, Sequence
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


def class_entries(predictors: Predictors, state: Mapping[str, Tensor]) -> Iterator[tuple[str, ClassRows]]:
    """The keys of `state` that are the weights and biases of `predictors`."""
    for name, rows in predictors.items():
        yield from ((key, rows) for key in (f"{name}.weight", f"{name}.bias") if key in state)


def in_order(
    predictors: Predictors, state: Mapping[str, Tensor], names: Sequence[str], own_names: Sequence[str]
) -> dict[str, Tensor]:
    """`state`, of the classes `names`, with its rows in the order of `own_names`, which are the same names.

    Rows after those of the named classes stay where they are.
    """
    arranged = dict(state)
    order = [names.index(name) for name in own_names]
    for key, rows in class_entries(predictors, state):
        if rows.num_classes(state[key]) >= len(order):
            old = rows.by_class(state[key])
            new = old.clone()
            begin, end = rows.background, rows.background + len(order)
            new[:, begin:end] = old[:, begin:end][:, order]
            arranged[key] = new.flatten(0, 2)
    return arranged
