"""Population statistics as training gathers them: an exponential moving average of what normalizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Moments


@dataclass
class Population:
    """Running statistics, and how a training step moves them.

    Attributes:
        mean, var: `(C,)` of all domains, or `(K, C)`.
        num_batches_tracked: EMA steps, `()` or `(K,)`.
        momentum: of the EMA, in torch's meaning; None: the cumulative average.
        averages_deviation: whether `sqrt(var + eps)` is averaged (Batch Renorm), and not the unbiased variance.
        eps: for that.
        deviation: the mean of sqrt(var + eps) over the groups of each set of a step, where it is not that of the set
            (micro-batches of Batch Renorm); None: it is.
        total_var: the variance of the average, that between steps included: the EMA of x² minus mean²; None: not kept.
    """

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor
    momentum: float | None
    averages_deviation: bool = False
    eps: float = 0.0
    total_var: Tensor | None = None
    deviation: Tensor | None = None

    def of_domain(self, domain: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and number of steps of one domain; of all, where they are shared."""
        values = (self.mean, self.var, self.num_batches_tracked)
        return values if self.mean.ndim == 1 else tuple(v[domain] for v in values)  # type: ignore[return-value]

    def copy(self) -> Population:
        """Statistics to move in place of these."""
        mean, var, tracked = (v.clone() for v in (self.mean, self.var, self.num_batches_tracked))
        total = None if self.total_var is None else self.total_var.clone()
        return Population(mean, var, tracked, self.momentum, self.averages_deviation, self.eps, total)

    def update(self, moments: Moments, counts: Sequence[float] | None) -> None:
        """One step for each set of `moments` that has elements; a set of one element moves the mean only.

        Sets of which there are more than statistics move these one after the other, as a BatchNorm that is called once
        for each (rows 3 and 5 of Table 5 in *Rethinking "Batch"*).

        Args:
            moments: `(1, C)` or `(K, C)`, without a graph.
            counts: elements of each set, where they are known on the host.
        """
        sets = moments.mean.shape[0]
        if self.mean.ndim == 2 or sets == 1:
            self._step(moments, counts, self.deviation)
        else:
            for k in range(sets):
                one = slice(k, k + 1)
                deviation = None if self.deviation is None else self.deviation[one]
                self._step(moments[one], None if counts is None else counts[one], deviation)

    def _step(self, moments: Moments, counts: Sequence[float] | None, deviation: Tensor | None) -> None:
        shape, dtype = moments.mean.shape, self.mean.dtype
        mean, var = self.mean.view(shape), self.var.view(shape)
        tracked = self.num_batches_tracked.view(-1, 1)
        several = counts is not None and min(counts) > 1  # in every set: no step depends on the number of elements
        if several:
            tracked += 1
        else:
            count = moments._tensors()[0].to(dtype)
            tracked += count > 0
        step: Tensor | float = self.momentum if self.momentum is not None else 1 / tracked.clamp(min=1).to(dtype)
        var_step = step
        if not several:
            step, var_step = count.clamp(max=1) * step, (count - 1).clamp(0, 1) * step
        if self.total_var is not None:  # as two sets are merged, which loses no digits where the mean is large
            between = (1 - step) * (moments.mean - mean).square()
            _move(self.total_var.view(shape), moments.var + between, step)
        _move(mean, moments.mean, step)
        if self.averages_deviation:
            before, own = ((v.to(dtype) + self.eps).sqrt() for v in (var, moments.var))
            moved = before.lerp(own if deviation is None else deviation.to(dtype), var_step).square() - self.eps
            var.copy_(moved if several else torch.where(count > 1, moved, var))
        elif several and len(counts) == 1:  # type: ignore[arg-type]
            _move(var, moments.var * (counts[0] / (counts[0] - 1)), var_step)  # type: ignore[index]
        else:
            _move(var, moments.unbiased_var(), var_step)


def _move(buffer: Tensor, values: Tensor, step: Tensor | float) -> None:
    """A buffer towards values, in its own dtype."""
    buffer.lerp_(values.to(buffer.dtype), step.to(buffer.dtype) if isinstance(step, Tensor) else step)
