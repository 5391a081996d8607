"""BatchNorm corrected towards its population statistics."""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batches import Affine, corrected, read
from ..kernels.compiled_batches import Batches, Towards
from ..moments import Moments
from .domain_batch_norm import DomainBatchNorm
from .domains import DomainBatch
from .split import Split

RECENT = 64  # forward passes that activation checkpointing may recompute
Limit = float | Sequence[tuple[float, float]] | Callable[[int], float]
_Buffers = tuple[Tensor, ...]  # running mean and variance, steps


class BatchRenorm(DomainBatchNorm):
    """`x̂ = (x - μ_B) / σ_B · r + d`, then γ and β (*Batch Renormalization*, Alg. 1).

    `r = σ_B / σ` within `[1 / r_max, r_max]` and `d = (μ_B - μ) / σ` within `[-d_max, d_max]` are constants to
    autograd: within the limits, training normalizes as inference does. With `r_max=1, d_max=0` it is BatchNorm. The
    moving μ and σ are those from before the forward pass. σ = √(v_B + eps) itself is averaged, not the variance; it is
    kept as `running_var` = σ² - eps, so that a BatchNorm's checkpoint infers the same.

    Args:
        num_features: C.
        r_max, d_max: a number from the first step; or points `(step, value)` with straight lines between them, such as
            the paper's `r_max=[(5000, 1), (40000, 3)], d_max=[(5000, 0), (25000, 5)]`; or any function of the step
            (which makes a GPU wait). Before the moving averages have found the features, r and d pull towards mean 0
            and variance 1: begin with 1 and 0 for a few multiples of `1 / momentum` steps. Steps are training
            forwards, as `num_batches_tracked` counts them: of each domain, where the domains share it.
        momentum: of the EMA (the paper's α).
        group_size: samples of a micro-batch, normalized apart, as in `GhostBatchNorm` (§4.2); None: all.
        allow_smaller_batch: of `GhostBatchNorm`.
        **options: of `DomainBatchNorm`; `sync` without `group_size` only.

    Raises:
        ValueError: a limit below 1 (`r_max`) or 0 (`d_max`); `sync` with `group_size`.
        RuntimeError: activation checkpointing, and which forward pass is recomputed cannot be told.
    """

    plain = False
    averages_deviation = True

    def __init__(
        self,
        num_features: int,
        r_max: Limit = 3.0,
        d_max: Limit = 5.0,
        momentum: float | None = 0.01,
        group_size: int | None = None,
        *,
        allow_smaller_batch: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_features, momentum=momentum, **options)
        if group_size is not None:
            if self.sync:
                raise ValueError(f"group_size={group_size} splits one rank's samples: leave it out, or sync")
            self.split = Split("group_size", size=group_size, allow_smaller_batch=allow_smaller_batch)
        for name, limit, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
            values = [(0, least)] if callable(limit) else _points(limit)
            if not values or any(value < least for _, value in values):
                raise ValueError(f"{name} takes numbers from {least} on, or points (step, number), got {limit}")
            if [step for step, _ in values] != sorted({step for step, _ in values}):
                raise ValueError(f"{name} takes points (step, value) of increasing steps, got {limit}")
        self.r_max = r_max
        self.d_max = d_max
        self.group_size = group_size
        # Of the last training forwards, the batch's mean and the buffers that it was normalized towards: those move,
        # and activation checkpointing computes the forward again.
        self._recent: deque[tuple[Tensor, _Buffers]] = deque(maxlen=RECENT)

    def _corrected(self, affine: Affine, batch: DomainBatch, merged: Moments, of: Moments) -> Affine:
        if not self.training:
            return affine
        if torch.compiler.is_compiling():
            return corrected(affine, *map(_saved, self._correction(batch, of, self._moving())))
        mean = merged.mean.detach()
        if batch.updates:
            self._remember(mean)
            return corrected(affine, *self._correction(batch, of, self._moving()))
        return corrected(affine, *self._correction(batch, of, self._remembered(mean)))

    def _towards(self, batch: DomainBatch, batches: Batches) -> Towards | None:
        if not self.training:
            return None
        # activation checkpointing runs this forward again
        again = not batch.updates
        mean, var, steps = self._remembered(read(batch.tensors, batches).counted[0]) if again else self._moving()
        limits = []
        for limit in (self.r_max, self.d_max):
            values = [limit] if isinstance(limit, (int, float)) else _at(limit, steps).flatten().tolist()
            limits.append(values * (len(batches.counts) // len(values)))
        return Towards(mean, var, *limits)

    def _moving(self) -> _Buffers:
        return self.running_mean, self.running_var, self.num_batches_tracked

    @torch.no_grad()
    def _correction(self, batch: DomainBatch, of: Moments, towards: _Buffers) -> tuple[Tensor, Tensor]:
        """r and d of what is normalized by the moments `of`."""
        mean, var = (self._of_rows(v, batch) for v in towards[:2])
        r_max, d_max = (
            limit
            if isinstance(limit, (int, float))
            else self._of_rows(_at(limit, towards[2].unsqueeze(-1)), batch).to(of.mean.dtype)
            for limit in (self.r_max, self.d_max)
        )
        sigma = (var.to(of.mean.dtype) + self.eps).sqrt()
        r = (of.var + self.eps).sqrt() / sigma
        d = (of.mean - mean) / sigma
        return r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)

    def _remember(self, mean: Tensor) -> None:
        self._recent.append((mean, tuple(v.clone() for v in self._moving())))

    def _remembered(self, mean: Tensor) -> _Buffers:
        """The buffers that the batch with this mean was normalized towards, for a forward pass that is recomputed."""
        found = [record for record in self._recent if torch.equal(record[0], mean)]
        if len(found) != 1:
            raise RuntimeError(
                f"BatchRenorm cannot be recomputed: {len(found)} of its last {len(self._recent)} forward passes had "
                "this input; run backward after each, or leave the layer out of activation checkpointing"
            )
        self._recent = deque((r for r in self._recent if r is not found[0]), maxlen=RECENT)
        return found[0][1]

    def grouping(self) -> str:
        return "" if self.group_size is None else f"group_size={self.group_size}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"


@torch.library.custom_op("domainnorm::saved", mutates_args=())
def _saved(x: Tensor) -> Tensor:
    """What the compiler must keep for the backward pass: it would compute it anew, from buffers that have moved."""
    return x.clone()


@_saved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _points(limit: float | Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    return [(0, limit)] if isinstance(limit, (int, float)) else limit


def _at(limit: Limit, step: Tensor) -> Tensor:
    """The limit at each of `step`."""
    if callable(limit):
        values = [float(limit(s)) for s in step.flatten().tolist()]
        return torch.tensor(values, device=step.device, dtype=torch.float64).view(step.shape)
    points = _points(limit)
    value = torch.full(step.shape, float(points[0][1]), device=step.device, dtype=torch.float64)
    for (begin, low), (end, high) in itertools.pairwise(points):
        value = value + (high - low) * ((step.double() - begin) / (end - begin)).clamp(0, 1)
    return value
