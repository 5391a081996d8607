"""The passes over the batches: population statistics, minibatch statistics, training, one layer alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..distributed import rank
from ..errors import UserError
from ..ops.moments import Moments
from ..statistics.batches import batch_size
from .divergence import mean_of
from .norms import Norm
from .observe import Call, Observer, Site
from .outputs import Change, Outputs, tensors_in
from .padding import padded_images, padding_of
from .seen import Propagated, Seen
from .site import SiteStatistics

KEPT = 64  # samples for the pass of one layer alone

Forward = Callable[[nn.Module, Any], Any]


class Passes:
    """Runs the model over batches, and fills in what is `seen`.

    Args:
        model: in eval mode, within `preserve_state`.
        seen: is filled in.
        forward: `forward(model, batch)` -> output.
        loss: `loss(model, batch)` of a model in training mode; None: training is what inference does, with
            minibatch statistics.
        progress: whether rank 0 shows a bar.
    """

    def __init__(
        self, model: nn.Module, seen: Seen, forward: Forward, loss: Forward | None = None, progress: bool = True
    ) -> None:
        self.model = model
        self.seen = seen
        self.forward = forward
        self.loss = loss
        self.progress = progress
        self.observer = Observer(seen.norms)
        self.follow = [k for k, norm in enumerate(seen.norms) if norm.follows_batches]
        self.kept: list[tuple[Any, Outputs]] = []  # batches, with the outputs under population statistics

    def measure(self, batches: Iterable[Any], source: str = "") -> None:
        """The passes over the batches of one source, batch by batch: an iterator will do."""
        disable = None if self.progress and rank() == 0 else True
        for batch in tqdm(batches, desc=f"audit{f' {source}' if source else ''}", unit=" batches", disable=disable):
            self._measure(batch, source)

    def _measure(self, batch: Any, source: str) -> None:
        seen, images = self.seen, batch_size(batch)
        population, calls = self.run(batch)
        calls = self._folded(calls, images)
        self._add(seen.inference, calls, images, "")
        with self.observer.by_minibatch(self.follow):
            minibatch, others = self.run(batch)
        others = self._folded(others, images)
        seen.output.add(population, minibatch)
        self._compare(calls, others)
        if self.loss is not None:
            others = self.train(batch)
        self._add(seen.own, others, images, "")
        if source:
            self._add(seen.by_source, others, images, source)
        if sum(batch_size(kept) for kept, *_ in self.kept) < KEPT:
            self.kept.append((batch, population))
        seen.samples += images
        seen.batches += 1
        seen.passes = 2 + (self.loss is not None)

    def run(self, batch: Any) -> tuple[Outputs, list[Call]]:
        """One forward pass."""
        self.observer.begin(padding_of(batch))
        with padded_images(self.model, self._padded):
            output = self.forward(self.model, batch)
        return tensors_in(output), self.observer.calls

    def train(self, batch: Any) -> list[Call]:
        """One forward pass of training, without its gradients."""
        assert self.loss is not None
        with self.in_training_mode(), self.observer.by_minibatch(self.follow):
            self.observer.begin(padding_of(batch))
            with padded_images(self.model, self._padded):
                self.loss(self.model, batch)
        return self.observer.calls

    @contextlib.contextmanager
    def in_training_mode(self) -> Iterator[None]:
        """In this block all but the norms are in training mode; these normalize as they are told."""
        self.model.train()
        for norm in self.seen.norms:
            norm.module.eval()
        try:
            yield
        finally:
            self.model.eval()

    def _padded(self, padding: Any) -> None:
        self.observer.padding = padding

    def switch_alone(self, k: int) -> None:
        """One more pass over the batches that were kept: what a layer alone does to the output."""
        change = Change()
        for batch, population in self.kept:
            with self.observer.by_minibatch([k]):
                output, _ = self.run(batch)
            change.add(population, output)
        if change:
            self.seen.alone[k] = change.value

    def _folded(self, calls: list[Call], images: int) -> list[Call]:
        """Calls of a model that takes the images of a batch one by one, as those of one forward pass of all."""
        numbers: dict[int, int] = {}
        for call in calls:
            numbers[call.norm] = max(numbers.get(call.norm, 0), call.number + 1)
        alone = images > 1 and all(number % images == 0 for number in numbers.values())
        alone = alone and all(call.rows.mean.shape[0] <= 1 for call in calls if call.number == 0 and call.norm == 0)
        if not (alone and numbers):
            return calls
        joined: dict[Site, Call] = {}
        for call in calls:
            call.number %= numbers[call.norm] // images
            if (before := joined.get(call.site)) is None:
                joined[call.site] = call
            else:
                before.rows = Moments.cat([before.rows, call.rows])
                before.batch = before.batch + call.batch
                before.samples += call.samples
                before.elements += call.elements
                before.part = _joined(before.part, call.part)
        return list(joined.values())

    def _add(self, sites: dict[Any, SiteStatistics], calls: Sequence[Call], images: int, source: str) -> None:
        for call in calls:
            key = (call.site, source) if source else call.site
            if key not in sites:
                sites[key] = SiteStatistics(self.seen.norms[call.norm], call.number, call.domain, source)
            sites[key].add(call, images)

    def _compare(self, population: Sequence[Call], minibatch: Sequence[Call]) -> None:
        """How far the normalized values of both passes are apart, at each site."""
        others = {call.site: call for call in minibatch}
        for call in population:
            other = others.get(call.site)
            if other is None or call.part is None or other.part is None or call.part.shape != other.part.shape:
                continue
            norm: Norm = self.seen.norms[call.norm]
            k = norm.row(call.domain)
            one = _normalized(call.part, norm.mean[k], norm.var[k], norm.eps)
            if call.norm in self.follow:
                two = _normalized(other.part, other.batch.mean[0], other.batch.var[0], norm.eps)
            else:
                two = _normalized(other.part, norm.mean[k], norm.var[k], norm.eps)
            change = mean_of((one - two).square().mean((0, 2)))
            found = self.seen.propagated.setdefault(call.site, Propagated())
            found.total += change
            found.batches += 1


def _normalized(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """`x` `(n, C, p)` normalized by statistics `(C,)`."""
    return (x - mean[:, None]) / (var[:, None] + eps).sqrt()


def _joined(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None or one.shape[1:] != other.shape[1:]:
        return one
    return torch.cat([one, other])


def given_sources(batches: Iterable[Any] | Mapping[str, Iterable[Any]]) -> dict[str, Iterable[Any]]:
    """Sets of batches by their names; one without a name is `""`.

    Raises:
        UserError: one batch, and not several.
    """
    sources = dict(batches) if isinstance(batches, Mapping) else {"": batches}
    for name, own in sources.items():
        if isinstance(own, (Tensor, str)) or not isinstance(own, Iterable):
            where = f" for {name!r}" if name else ""
            raise UserError(
                f"batches takes several batches in a list, a loader or another iterable, got one {type(own).__name__}"
                f"{where}: give [batch] if it is one"
            )
    return sources
