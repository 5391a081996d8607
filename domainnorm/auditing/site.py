"""What is known of one call of a norm, and one domain, after all batches."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.moments import Moments
from .divergence import divergence, inconsistency, mean_of, noise, seldom, variance_between, variance_of_squares
from .norms import Norm
from .observe import Call

_ENOUGH = 1000  # elements of a channel, among which an event would have been that is not very rare


@dataclass
class BatchSize:
    """What one normalization batch of training has.

    Attributes:
        elements: of a channel.
        samples: rows of the input.
        images: samples of the batch that the model was given: RoIs of an image are no more than one.
    """

    elements: float
    samples: int
    images: int

    @property
    def independent(self) -> int:
        return min(self.samples, self.images)


@dataclass
class SiteStatistics:
    """Sums over batches; add, then read.

    Attributes:
        norm: the layer.
        call: the number of the call within a forward pass.
        domain: of the samples.
        source: which of several sets of batches they are of; "" where there is one.
    """

    norm: Norm
    call: int
    domain: int
    source: str = ""
    sizes: list[BatchSize] = field(default_factory=list)
    total: Moments | None = None
    batches: Moments | None = None  # of the batches' means, each counting as its samples
    unpadded: Moments | None = None
    padded: list[float] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)
    not_finite: int = 0  # batches with NaN or inf
    _rows: Moments | None = None  # of the samples' means, each counting once
    _squares: Moments | None = None  # of the samples' mean squared deviations from `_center`
    _center: Tensor | None = None
    _within: Moments | None = None  # of the samples' means around that of their batch
    _alone: Tensor | None = None
    _training: Moments | None = None

    def add(self, call: Call, images: int) -> None:
        """One batch."""
        rows, samples = call.rows, call.rows.mean.shape[0]
        self.dtypes.add(call.dtype)
        grouped = self.norm.samples_per_group(call.samples)
        elements = call.elements * grouped / max(1, call.samples)
        self.sizes.append(BatchSize(elements, grouped, max(1, images * grouped // max(1, call.samples))))
        if not samples or not call.elements:
            return
        whole = rows.merge(0)
        if not (whole.mean.isfinite().all() and whole.var.isfinite().all()):
            self.not_finite += 1
            return
        if self._center is None:
            self._center = whole.mean
        squares = rows.var + (rows.mean - self._center).square()
        n, one = rows.mean.new_full((1, 1), samples), rows.mean.new_ones((1, 1))
        self.total = _plus(self.total, whole)
        self._rows = _plus(self._rows, _each(n, rows.mean))
        self._squares = _plus(self._squares, _each(n, squares))
        self._within = _plus(self._within, _each(n, rows.mean - whole.mean))
        self.batches = _plus(self.batches, Moments(n, whole.mean, torch.zeros_like(whole.mean)))
        self._training = _plus(self._training, Moments(one, call.batch.mean, call.batch.var))
        mean, var = self.running
        alone = inconsistency(call.batch.mean, call.batch.var, mean, var, self.norm.eps)
        self._alone = alone if self._alone is None else self._alone + alone
        if call.unpadded is not None:
            self.unpadded = _plus(self.unpadded, call.unpadded.merge(0))
            self.padded.append(call.padded)

    @property
    def place(self) -> str:
        """Its name in a message, without that of its source."""
        return self.norm.name

    @property
    def running(self) -> tuple[Tensor, Tensor]:
        """The running mean and variance that inference normalizes by, `(1, C)`."""
        k = self.norm.row(self.domain)
        return self.norm.mean[k : k + 1], self.norm.var[k : k + 1]

    @property
    def samples(self) -> int:
        """Rows, over all batches."""
        return 0 if self._rows is None else int(self._rows.count)

    @property
    def independent(self) -> float:
        """Samples that do not depend on each other, over all batches."""
        rows = sum(size.samples for size in self.sizes)
        return self.samples * sum(size.independent for size in self.sizes) / max(1, rows)

    @property
    def own(self) -> Moments:
        """The moments `(1, C)` of all batches.

        A channel that does not vary at all in few elements, and did before, is one of rare events: its variance is
        taken to be what it was.

        Raises:
            ValueError: no batch had an element, or a finite one.
        """
        if self.total is None:
            raise ValueError(f"{self.norm.name} was reached by no finite element")
        if float(self.total.count.max()) >= _ENOUGH:
            return self.total
        _, var = self.running
        rare = (self.total.var == 0) & (var > 0) & var.isfinite()
        return Moments(self.total.count, self.total.mean, torch.where(rare, var, self.total.var))

    def expected(self, *, with_average: bool = True) -> Tensor:
        """The divergence `(C,)` that sampling alone makes, of the batches and of a moving average of such batches."""
        assert self._rows is not None and self._squares is not None
        var, n = self.own.var, float(self._rows.count)
        between = variance_between(self._rows.var, var, n)
        squares = variance_of_squares(self._squares.var, var, n)
        found = noise(between, squares, var, self.norm.eps, self.independent)[0]
        momentum = self.norm.momentum
        if with_average and momentum and self.sizes:
            each = sorted(size.independent for size in self.sizes)[len(self.sizes) // 2]
            found = found + noise(between, squares, var, self.norm.eps, max(each, 1) * (2 - momentum) / momentum)[0]
        return found

    def drift(self) -> Tensor:
        """The divergence `(C,)` of all batches' moments from the running statistics."""
        return divergence(self.own.mean, self.own.var, *self.running, self.norm.eps)[0]

    def alone(self) -> Tensor:
        """The mean squared change `(C,)` of a normalized value between minibatch and population statistics."""
        assert self._alone is not None and self._training is not None
        return self._alone[0] / float(self._training.count)

    def alone_expected(self) -> Tensor:
        """What of `alone` is due to the size of the batches: that of population statistics without any error."""
        assert self._rows is not None and self._squares is not None
        var, n = self.own.var, float(self._rows.count)
        between = variance_between(self._rows.var, var, n)
        squares = variance_of_squares(self._squares.var, var, n)
        each = sum(1 / max(1, size.independent) for size in self.sizes) / len(self.sizes)
        whole = var + self.norm.eps
        return (between / whole + 0.25 * squares / whole.square())[0] * each

    def between_batches(self) -> float:
        """How much more the batches' means vary than those of random batches of the same samples would.

        The F statistic of one-way analysis of variance, the mean over channels: about 1 for samples in any order.
        """
        if self.batches is None or self._within is None or self._training is None:
            return 1.0
        groups, samples = float(self._training.count), float(self._within.count)
        if groups < 2 or samples <= groups:
            return 1.0
        within = self._within.var * samples / (samples - groups)
        between = self.batches.var * samples / (groups - 1)
        usable = within > 1e-12 * (self.own.var + self.norm.eps)
        return mean_of((between / within)[usable]) if bool(usable.any()) else 1.0

    def between_batches_by_chance(self) -> float:
        """What `between_batches` exceeds once in a thousand times, were all channels one."""
        groups = float(self._training.count) if self._training else 0.0
        return seldom(groups - 1, self.samples - groups)


def _plus(total: Moments | None, other: Moments) -> Moments:
    return other if total is None else total + other


def _each(count: Tensor, values: Tensor) -> Moments:
    """The moments `(1, C)` of values `(n, C)`, each counting once."""
    return Moments(count, values.mean(0, keepdim=True), values.var(0, correction=0, keepdim=True))
