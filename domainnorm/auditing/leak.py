"""How predictions change where the samples of the normalization batches are exchanged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..distributed import gather_objects, rank
from ..errors import UserError
from ..statistics.preserve import preserve_state
from .mixing import Mixing
from .outputs import Change, confidence, tensors_in

if TYPE_CHECKING:
    from .run import Passes

TOGETHER = 8  # batches that exchange samples


@dataclass
class Leak:
    """What is measured of each batch as it is given, `G`, and in two random mixes, `A` and `B`.

    Attributes:
        confidences: largest probabilities or sums of scores, `(G, A, B)`.
        losses: if a loss was given.
        changes: mean squared relative changes of the predictions, between G and A, G and B, A and B.
        alone: layers whose samples could not be exchanged.
    """

    confidences: list[tuple[float, ...]] = field(default_factory=list)
    losses: list[tuple[float, ...]] = field(default_factory=list)
    changes: list[tuple[float, ...]] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)

    @property
    def measure(self) -> str:
        """What is compared: a loss, or how sure the model is."""
        return "loss" if self.losses else "confidence"

    def effect(self) -> tuple[float, bool]:
        """How much better the given batches are than mixes, as a share, and whether that is significant."""
        values = _finite(self.losses or self.confidences)
        if not len(values):
            return float("nan"), False
        given, mixed = values[:, 0], values[:, 1:].mean(1)
        better = mixed - given if self.losses else given - mixed
        largest = max(abs(float(given.mean())), abs(float(mixed.mean())))
        # where nothing but chance tells the three apart, this has the variance of `better`, and mean 0
        by_chance = (values[:, 1] - values[:, 2]) * 0.75**0.5
        value = float(better.mean()) / largest if largest else 0.0
        return value, _is_significant(better, float(by_chance.square().mean()))

    def change(self) -> tuple[float, float, bool]:
        """The relative change from given to mixed batches, that between mixes, and whether the former is larger."""
        values = _finite(self.changes)
        if not len(values):
            return float("nan"), float("nan"), False
        given, mixed = values[:, :2].mean(1), values[:, 2]
        larger = _is_significant(given - mixed, 0.0) and bool(given.mean() > mixed.mean())
        return float(given.mean()) ** 0.5, float(mixed.mean()) ** 0.5, larger

    def figures(self) -> dict[str, float]:
        """For a report."""
        values = _finite(self.losses or self.confidences)
        means = values.mean(0).tolist() if len(values) else [float("nan")] * 3
        value, is_significant = self.effect()
        given, mixed, _ = self.change()
        return {
            f"{self.measure}_given": means[0],
            f"{self.measure}_mixed": (means[1] + means[2]) / 2,
            "effect": value,
            "significant": float(is_significant),
            "change_given": given,
            "change_mixed": mixed,
            "batches": float(len(self.changes)),
        }


def measure_leak(passes: Passes, sources: Mapping[str, Sequence[Any]]) -> Leak:
    """Three passes over the batches, within `preserve_state`, and three more with a loss.

    Raises:
        UserError: there are no two batches of one source to exchange samples between, or the model runs its layers in
            another order for another batch.
    """
    mixing, found = Mixing(passes.model, passes.seen.norms), Leak()
    found.alone = [passes.seen.norms[k].name for k in mixing.alone]
    if not mixing.mixed:
        return found
    pools = [pool for own in sources.values() for pool in _pools(own)]
    if not all(gather_objects(bool(pools))):
        raise UserError("leak=True exchanges samples between batches: expected two batches or more, got one")
    disable = None if passes.progress and rank() == 0 else True
    with preserve_state(passes.model), mixing.attached():
        for number, pool in enumerate(tqdm(pools, desc="audit, mixed batches", unit=" pools", disable=disable)):
            forwards = [partial(passes.predict, batch) for batch in pool]
            for outputs in zip(*_three(mixing, forwards, number), strict=True):
                found.confidences.append(tuple(map(confidence, outputs)))
                found.changes.append(_changes(*map(tensors_in, outputs)))
            if passes.loss is not None:
                with passes.in_training_mode():
                    forwards = [partial(passes.score, batch) for batch in pool]
                    three = _three(mixing, forwards, number)
                    found.losses += [tuple(map(_total, losses)) for losses in zip(*three, strict=True)]
    passes.seen.passes += 3 if passes.loss is None else 6
    for name in ("confidences", "losses", "changes"):
        setattr(found, name, [row for own in gather_objects(getattr(found, name)) for row in own])
    return found


def _pools(batches: Sequence[Any]) -> list[Sequence[Any]]:
    """Batches from all over the sequence, at most so many together; none where there is one batch."""
    number = math.ceil(len(batches) / TOGETHER)
    return [batches[k::number] for k in range(number)] if len(batches) > 1 else []


def _three(mixing: Mixing, forwards: Sequence[Callable[[], Any]], number: int) -> list[list[Any]]:
    """What the forward passes return as given and in two mixes, from the same random numbers."""
    three = []
    devices = list(range(torch.cuda.device_count()))
    for seed in (None, 2 * number + 1, 2 * number + 2):
        with torch.random.fork_rng(devices):
            three.append(mixing.run(forwards, seed))
    return three


def _changes(given: list[Tensor], one: list[Tensor], other: list[Tensor]) -> tuple[float, ...]:
    squares = []
    for a, b in ((one, given), (other, given), (one, other)):
        change = Change()
        change.add(a, b)
        squares.append(change.square)
    return tuple(squares)


def _total(loss: Any) -> float:
    """A loss, or the sum of several."""
    if isinstance(loss, Tensor):
        return float(loss.mean())
    values: Iterable[Any] = loss.values() if isinstance(loss, Mapping) else loss
    return float(loss) if isinstance(loss, (int, float)) else sum(map(_total, values))


def _finite(rows: Sequence[tuple[float, ...]]) -> Tensor:
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
    return values[values.isfinite().all(1)]


def _is_significant(values: Tensor, variance: float) -> bool:
    """Whether their mean is not 0, on a level of 0.3% (two-sided).

    Args:
        values: one of each batch: samples that share a batch are not independent.
        variance: that they have at least.
    """
    n = len(values)
    if n < 3:
        return False
    error = (max(float(values.var()), variance) / n) ** 0.5
    return abs(float(values.mean())) > _quantile(n - 1) * error


def _quantile(degrees: int) -> float:
    """The value that Student's t exceeds with a probability of 0.15%, accurate to a percent from 5 degrees on.

    (A. Hill, Algorithm 396, CACM 13, 1970.)
    """
    z = 2.968
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / degrees ** (k + 1) for k, term in enumerate(terms))
