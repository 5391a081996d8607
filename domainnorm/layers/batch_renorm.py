"""BatchNorm corrected towards its population statistics."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..moments import Moments
from .domain_batch_norm import DomainBatchNorm, _of_domain
from .domains import Domain, DomainBatch
from .split import Split

Limit = float | Sequence[tuple[float, float]] | Callable[[int], float]


class BatchRenorm(DomainBatchNorm):
    """`x̂ = (x - μ_B) / σ_B · r + d`, then γ and β (*Batch Renormalization*, Alg. 1).

    `r = σ_B / σ` within `[1 / r_max, r_max]` and `d = (μ_B - μ) / σ` within `[-d_max, d_max]` are constants to
    autograd: within the limits, training normalizes as inference does. With `r_max=1, d_max=0` it is BatchNorm. The
    moving μ and σ are those from before the forward pass. σ = √(v_B + eps) itself is averaged, not the variance; it is
    kept as `running_var` = σ² - eps, so that a BatchNorm's checkpoint infers the same.

    Args:
        num_features: C.
        r_max, d_max: a number from the first step; or points `(step, value)` with straight lines between them, such as
            the paper's `r_max=[(5000, 1), (40000, 3)], d_max=[(5000, 0), (25000, 5)]`; or any function of the
            step (which makes a GPU wait). Steps are training forwards, as `num_batches_tracked` counts them.
        momentum: of the EMA (the paper's α).
        group_size: samples of a micro-batch, normalized apart, as in `GhostBatchNorm` (§4.2); None: all.
        allow_smaller_batch: of `GhostBatchNorm`.
        **options: of `DomainBatchNorm`; `sync` without `group_size` only.

    Raises:
        ValueError: a limit below 1 (`r_max`) or 0 (`d_max`); `sync` with `group_size`.
        RuntimeError: activation checkpointing, and the layer ran again before the first run's backward pass.
    """

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
            self.split = Split(group_size, allow_smaller_batch=allow_smaller_batch)
        for name, limit, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
            values = [] if callable(limit) else _points(limit)
            if any(value < least for _, value in values):
                raise ValueError(f"{name} takes numbers from {least} on, got {limit}")
            if [step for step, _ in values] != sorted({step for step, _ in values}):
                raise ValueError(f"{name} takes points (step, value) of increasing steps, got {limit}")
        self.r_max = r_max
        self.d_max = d_max
        self.group_size = group_size
        # of the last training forward: the batch's mean, and what it was normalized towards
        self._last: tuple[Tensor, ...] | None = None

    def _normalize(self, batch: DomainBatch, merged: Moments) -> list[Tensor]:
        if self.training:
            mean = merged.mean.detach()
            if batch.updates:
                before = (self.running_mean, self.running_var, self.num_batches_tracked)
                self._last = (mean, *(v.clone() for v in before))  # the buffers move before a recomputed forward
            elif self._last is None or not torch.equal(self._last[0], mean):
                raise RuntimeError(
                    "BatchRenorm cannot be recomputed after another forward pass: run backward after each one, or "
                    "leave the layer out of activation checkpointing"
                )
        return super()._normalize(batch, merged)

    def _affine_of(self, domain: Domain, of: Moments) -> tuple[Tensor | None, Tensor | None]:
        weight, bias = super()._affine_of(domain, of)
        if not self.training or not self.uses_minibatch:
            return weight, bias
        assert self._last is not None
        _, mean, var, steps = self._last
        mean, var = (_of_domain(v, domain).to(of.mean.dtype) for v in (mean, var))
        step = (steps[domain] if steps.ndim else steps).unsqueeze(-1)
        r_max, d_max = (_at(limit, step).to(of.mean.dtype) for limit in (self.r_max, self.d_max))
        with torch.no_grad():
            sigma = (var + self.eps).sqrt()
            r = ((of.var + self.eps).sqrt() / sigma).clamp(1 / r_max, r_max)
            d = ((of.mean - mean) / sigma).clamp(-d_max, d_max)
        return r if weight is None else weight * r, (d if weight is None else weight * d) + (
            0 if bias is None else bias
        )

    def _move_var(self, moments: Moments, step: Tensor) -> None:
        sigma, new = ((v.to(step.dtype) + self.eps).sqrt() for v in (self.running_var, moments.var))
        self.running_var.copy_(torch.where(step > 0, sigma.lerp(new, step).square() - self.eps, self.running_var))

    def extra_repr(self) -> str:
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}{groups}"


def _points(limit: float | Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    return [(0, limit)] if isinstance(limit, (int, float)) else limit


def _at(limit: Limit, step: Tensor) -> Tensor:
    """The limit at each of `step`."""
    if callable(limit):
        return torch.tensor([float(limit(s)) for s in step.flatten().tolist()], device=step.device).view(step.shape)
    points = _points(limit)
    value = torch.full(step.shape, float(points[0][1]), device=step.device, dtype=torch.float64)
    for (begin, low), (end, high) in itertools.pairwise(points):
        value = value + (high - low) * ((step - begin) / (end - begin)).clamp(0, 1)
    return value
