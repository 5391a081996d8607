"""BatchNorm corrected towards its population statistics."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.formula import Normalization
from .domain_batch_norm import DomainBatchNorm
from .inputs import LayerInput
from .renamed import renamed_arguments
from .sample_groups import SampleGroups

RECENT = 64  # forward passes that activation checkpointing may recompute
Limit = float | Sequence[tuple[float, float]] | Callable[[int], float]
_Buffers = tuple[Tensor, ...]  # running mean and variance, steps; none where there are no averages


class BatchRenorm(DomainBatchNorm):
    """`x̂ = (x - μ_B) / σ_B · r + d`, followed by γ and β (*Batch Renormalization*, Algorithm 1).

    `r = σ_B / σ`, clipped to `[1 / r_max, r_max]`, and `d = (μ_B - μ) / σ`, clipped to `[-d_max, d_max]`, are constants
    to autograd. Where neither is clipped, training normalizes as inference does. With `r_max=1, d_max=0` this is
    BatchNorm. The running μ and σ are those from before the forward pass. The EMA averages σ = √(v_B + eps) itself, not
    the variance; it is stored as `running_var` = σ² - eps, so that a BatchNorm checkpoint gives the same inference.

    Args:
        num_features: number of channels, C.
        r_max, d_max: a constant; or points `(step, value)` with straight lines between them, such as the paper's
            `r_max=[(5000, 1), (40000, 3)], d_max=[(5000, 0), (25000, 5)]`; or any function of the step (which makes a
            GPU wait). Until the running statistics fit the features, r and d pull towards mean 0 and variance 1: start
            with 1 and 0 for a few times `1 / momentum` steps. Steps are training forward passes, as counted by
            `num_batches_tracked`; domains that share it each count.
        momentum: of the EMA (the paper's α).
        samples_per_group: number of samples in a micro-batch that is normalized separately, as in `GhostBatchNorm`
            (§4.2); None: all samples. The EMA then averages the mean of the micro-batches' σ_B.
        allow_smaller_batch: as in `GhostBatchNorm`.
        **options: of `DomainBatchNorm`; `sync` only without `samples_per_group`.

    Shape:
        - Input: `(N, C, *)`, or a list of such tensors
        - Output: same as the input

    Raises:
        ValueError: a limit below 1 (`r_max`) or 0 (`d_max`); `sync` with `samples_per_group`.
        RuntimeError: under activation checkpointing, if the layer cannot tell which forward pass is recomputed.

    Example::

        >>> norm = dn.BatchRenorm(16, r_max=[(100, 1), (1000, 3)], d_max=[(100, 0), (1000, 5)])
        >>> x = torch.randn(4, 16, 8, 8)
        >>> torch.allclose(norm(x), nn.BatchNorm2d(16)(x), atol=1e-5)  # as long as r is 1 and d is 0
        True
    """

    averages_deviation = True
    _renamed: ClassVar = {"group_size": "samples_per_group"}

    @renamed_arguments(_renamed)
    def __init__(
        self,
        num_features: int,
        *,
        r_max: Limit = 3.0,
        d_max: Limit = 5.0,
        momentum: float | None = 0.01,
        samples_per_group: int | None = None,
        allow_smaller_batch: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_features, momentum=momentum, **options)
        if samples_per_group is not None:
            if self.sync:
                raise ValueError(
                    f"samples_per_group={samples_per_group} splits one rank's samples: leave it out, or sync"
                )
            self.sample_groups = SampleGroups(
                "samples_per_group", size=samples_per_group, allow_smaller_batch=allow_smaller_batch
            )
        for name, limit, minimum in (("r_max", r_max, 1), ("d_max", d_max, 0)):
            values = [(0, minimum)] if callable(limit) else _points(limit)
            if not values or any(value < minimum for _, value in values):
                raise ValueError(f"{name} takes numbers from {minimum} on, or points (step, number), got {limit}")
            if [step for step, _ in values] != sorted({step for step, _ in values}):
                raise ValueError(f"{name} takes points (step, value) of increasing steps, got {limit}")
        self.r_max = r_max
        self.d_max = d_max
        self.samples_per_group = samples_per_group
        self._has_averages = True
        # The mean of each segment's batch, and the buffers at that time, of the last forward passes within activation
        # checkpointing: it computes them again when the buffers have moved.
        self._recent: deque[tuple[Tensor, _Buffers]] = deque(maxlen=RECENT)

    def normalization(self, inputs: LayerInput) -> Normalization:
        problem = super().normalization(inputs)
        if self.is_corrected and self.training and self.uses_minibatch and self.population is not None:
            problem.correction = _Correction(self, inputs)
        return problem

    def reset_running_stats(self) -> None:
        """As in torch, for `torch.optim.swa_utils.update_bn`: the next step has no averages to be corrected towards."""
        super().reset_running_stats()
        self._has_averages = self.frozen

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
        return "" if self.samples_per_group is None else f"samples_per_group={self.samples_per_group}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"


class _Correction:
    """r and d of a forward pass, by the mean and variance of each segment's normalization batch; computed once."""

    def __init__(self, layer: BatchRenorm, inputs: LayerInput) -> None:
        self.layer = layer
        self.again = not inputs.updates
        compiling = torch.compiler.is_compiling()
        # within activation checkpointing, which computes the forward pass again, and with other running statistics
        self.remember = not compiling and (not torch.is_grad_enabled() or _saved_tensors_are_hooked())
        self.keep = _saved if compiling else _unchanged
        self.known: tuple[Tensor, Tensor] | None = None

    def __call__(self, problem: Normalization, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        if self.known is None:
            with torch.no_grad():
                r, d = self._compute(problem, mean, var)
                self.known = self.keep(r), self.keep(d)
        return self.known

    def _compute(self, problem: Normalization, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layer
        population = layer.population
        assert population is not None
        running: _Buffers = ()
        if self.again:
            running = layer._remembered(mean)
        else:
            if layer._has_averages:
                running = (population.mean, population.var, population.num_batches_tracked)
            layer._has_averages = True
            if self.remember:
                layer._recent.append((mean.clone(), tuple(v.clone() for v in running)))
        if not running:
            return torch.ones_like(mean), torch.zeros_like(mean)
        running_mean, running_var = (problem.of_segments(v).to(mean.dtype) for v in running[:2])
        limits: list[Any] = [
            limit
            if isinstance(limit, (int, float))
            else problem.of_segments(_at(limit, running[2].unsqueeze(-1))).to(mean.dtype)
            for limit in (layer.r_max, layer.d_max)
        ]
        r_max, d_max = limits
        sigma = (running_var + layer.eps).sqrt()
        r = ((var + layer.eps).sqrt() / sigma).clamp(1 / r_max, r_max)
        d = ((mean - running_mean) / sigma).clamp(-d_max, d_max)
        return r, d


def _saved_tensors_are_hooked() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _unchanged(x: Tensor) -> Tensor:
    return x


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
