"""BatchNorm whose batch is an explicit choice, for inputs from several domains."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import Group, deepcopy_over_group, world_size
from ..moments import Moments, normalize_rows
from .domains import DomainBatch, Input
from .split import Split

CHOICES = ("shared", "per_domain")
Affine = tuple[Tensor | None, Tensor | None]  # γ and β
STATISTICS = ("auto", "minibatch", "population")


class DomainBatchNorm(nn.Module):
    """Batch normalization over inputs `(N, C, *)` of `num_domains` domains (*Rethinking "Batch"*, §5.2, Table 5).

    A domain is a source of features: a pyramid level, a data set. What is shared between domains is three
    independent choices. With one domain it is `nn.BatchNorm1d/2d/3d`, to rounding, with the same state dict.

    The domain of an input is always said:

    - `bn([x_1, …, x_K])`: one tensor per domain, any of them may be empty, sizes may differ; returns a list;
    - `bn(x, domain=k)`: a tensor of domain k;
    - `bn(x, domain=ids)`: a mixed batch, `ids` a LongTensor `(N,)`;
    - `bn(x)`: only with one domain.

    Args:
        num_features: C.
        num_domains: K.
        sgd_statistics: how training normalizes. `"shared"`: one mean and variance from the elements of all
            domains; `"per_domain"`: each domain its own.
        population_statistics: how inference normalizes. `"shared"`: one pair of buffers `(C,)`, updated with the
            merged moments if the SGD statistics are shared, else once per domain, in their order;
            `"per_domain"`: buffers `(K, C)`, each domain updated with its own moments.
        affine: γ and β, `"shared"`: `(C,)`; `"per_domain"`: `(K, C)`; None: none.
        eps: added to the variance.
        momentum: of the EMA, in torch's meaning; None: cumulative average.
        sync: True merges the moments of all ranks by their true element counts (uneven and empty ranks are
            exact); a process group: of its ranks. In training only. One collective per direction serves all
            domains; see `normalize_in_step` for several layers.

    Attributes:
        statistics: which statistics normalize. `"auto"`: minibatch in training, population in eval;
            `"minibatch"`: those of the current input, also in eval (no buffer changes then);
            `"population"`: the buffers, also in training (they do not change; γ and β still learn).
        example_weight: α in [0, 1]: how much, in inference under population statistics, the sample's own moments
            weigh against them (inference example weighing: *Four Things*, §3.1, Eq. 3).
        frozen: whether the statistics are `"population"` whatever is set.
        batch_hook: None, or a function of the layer and its input, called before it normalizes.

    In training a domain without elements changes no buffer, and a normalization batch of exactly one element is a
    ValueError, as in torch (with shared SGD and per-domain population statistics, a domain of one element updates
    its mean only). In inference under `"minibatch"` such an element becomes β. Double backward works without
    `sync`, and raises with it.
    """

    per_channel = True  # whether inference under population statistics is one affine of each channel
    split: Split | None = None  # of samples into groups that training normalizes apart

    def __init__(
        self,
        num_features: int,
        num_domains: int = 1,
        sgd_statistics: str = "per_domain",
        population_statistics: str = "per_domain",
        affine: str | None = "shared",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        sync: "bool | Group" = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1 or num_domains < 1:
            raise ValueError(
                f"num_features and num_domains take positive numbers, got {num_features} and {num_domains}"
            )
        _one_of("sgd_statistics", sgd_statistics, CHOICES)
        _one_of("population_statistics", population_statistics, CHOICES)
        _one_of("affine", affine, (*CHOICES, None))
        self.num_features = num_features
        self.num_domains = num_domains
        self.sgd_statistics = sgd_statistics
        self.population_statistics = population_statistics
        self.affine = affine
        self.eps = eps
        self.momentum = momentum
        self.sync = sync
        self.frozen = False
        self.statistics = "auto"
        self.example_weight = 0.0
        self.batch_hook: Callable[[DomainBatchNorm, DomainBatch], None] | None = None

        factory = {"device": device, "dtype": dtype}
        # With one domain, shared and per_domain are the same thing: (C,), as torch.
        self._register_statistics(num_features, factory)
        domains = (num_domains,) if affine == "per_domain" and num_domains > 1 else ()
        for name, initial in (("weight", torch.ones), ("bias", torch.zeros)):
            value = None if affine is None else nn.Parameter(initial(*domains, num_features, **factory))
            self.register_parameter(name, value)

    def _register_statistics(self, width: int, factory: dict[str, Any]) -> None:
        """Buffers of `width` means and variances a domain."""
        domains = (self.num_domains,) if self.population_statistics == "per_domain" and self.num_domains > 1 else ()
        self.register_buffer("running_mean", torch.zeros(*domains, width, **factory))
        self.register_buffer("running_var", torch.ones(*domains, width, **factory))
        self.register_buffer("num_batches_tracked", torch.zeros(domains, dtype=torch.long, device=factory["device"]))

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    @property
    def statistics(self) -> str:
        return "population" if self.frozen else self._statistics

    @statistics.setter
    def statistics(self, value: str) -> None:
        _one_of("statistics", value, STATISTICS)
        self._statistics = value

    @property
    def example_weight(self) -> float:
        return self._example_weight

    @example_weight.setter
    def example_weight(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"example_weight takes a number from 0 to 1, got {value}")
        self._example_weight = float(value)

    @property
    def uses_minibatch(self) -> bool:
        """Whether the next forward normalizes by the statistics of its input."""
        return self.training if self.statistics == "auto" else self.statistics == "minibatch"

    def forward(self, x: Input, domain: int | Tensor | None = None) -> Input:
        return normalize_in_step([self], [x], domain)[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> "DomainBatchNorm":
        return deepcopy_over_group(self, self.sync, memo)

    def reset_running_stats(self) -> None:
        """Population statistics as at construction: mean 0, variance 1, no step counted."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    # What another layer is made of: which moments its statistics count, and how it normalizes by given ones.

    def _moments(self, x: Tensor) -> tuple[Moments, Moments]:
        """The moments of the rows of `x`, and those `(N, …)` that the statistics count."""
        rows = Moments.rows(x)
        return rows, rows

    def _elements(self, x: Tensor) -> int:
        """How many numbers a row brings into a normalization batch."""
        return x.shape[2:].numel()

    def _normalize_by(
        self, x: Tensor, rows: Moments, of: Moments, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """`x` normalized by moments like the counted ones, broadcasting against them."""
        return normalize_rows(x, rows, of, weight, bias, self.eps)

    def _normalize_fixed(
        self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """`x` normalized by given statistics, `(C,)` or `(N, C)`; by torch's own inference kernel if it can."""
        if mean.ndim == 1 and (weight is None or weight.ndim == 1) and x.numel():
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        scale = (var + self.eps).rsqrt() if weight is None else weight * (var + self.eps).rsqrt()
        shift = -mean * scale if bias is None else bias - mean * scale
        rows = (*x.shape[:2], *[1] * (x.ndim - 2))
        scale, shift = (v.expand(x.shape[:2]).reshape(rows) for v in (scale, shift))
        return (x * scale + shift).to(x.dtype)

    def _affines(self, batch: DomainBatch, merged: Moments, of: list[Moments]) -> list[Affine]:
        """γ and β of each tensor, which is normalized by the moments `of`; `merged` are those of the domains."""
        return [(_of_domain(self.weight, domain), _of_domain(self.bias, domain)) for domain in batch.domains]

    def _batch(self, x: Input, domain: int | Tensor | None) -> DomainBatch:
        batch = DomainBatch.of(x, domain, self.num_domains, self.num_features, self._moments)
        batch.elements = [self._elements(tensor) for tensor in batch.tensors]
        return batch

    def _population(self, batch: DomainBatch) -> list[Tensor]:
        """Normalized by the buffers, in inference with the samples' own moments by `example_weight`."""
        weigh = self.example_weight > 0 and not self.training
        outputs = []
        for k, (x, domain) in enumerate(zip(batch.tensors, batch.domains, strict=True)):
            mean, var, weight, bias = (
                _of_domain(v, domain) for v in (self.running_mean, self.running_var, self.weight, self.bias)
            )
            if weigh:
                own = batch.counted()[k]
                outputs.append(self._normalize_by(x, batch.rows()[k], self._weighed(own, mean, var), weight, bias))
            else:
                outputs.append(self._normalize_fixed(x, mean, var, weight, bias))
        return outputs

    def _weighed(self, own: Moments, mean: Tensor, var: Tensor) -> Moments:
        """Eq. 3: the union of the sample's own moments and the population's, by the weights α and 1 - α."""
        mean, var = (v.to(own.mean.dtype).expand_as(own.mean) for v in (mean, var))
        shares = own.mean.new_tensor([self.example_weight, 1 - self.example_weight]).view(2, 1, 1)
        return Moments(shares, torch.stack([own.mean, mean]), torch.stack([own.var, var])).merge(0)[0]

    def _normalize(self, batch: DomainBatch, merged: Moments) -> list[Tensor]:
        """Normalized by the moments of each domain, `merged` `(K, C)`, over all ranks; updates the buffers."""
        shared = self.sgd_statistics == "shared"
        total = merged.merge(0) if shared else merged  # (1, C) or (K, C)
        if self.split is None:
            batches = [total[0 if shared else domain] for domain in batch.domains]
        else:
            batches = self.split.merge(batch, shared)
        affines = self._affines(batch, merged, batches)
        outputs = [
            self._normalize_by(x, rows, of, *affine)
            for x, rows, of, affine in zip(batch.tensors, batch.rows(), batches, affines, strict=True)
        ]
        if self.training and batch.updates:
            self._update_population(total if self.population_statistics == "shared" else merged)
        return outputs

    def _check_counts(self, batch: DomainBatch, merged: Moments, ranks: int) -> None:
        """A normalization batch of one element has no variance: ValueError, on every rank alike."""
        per_domain = self.sgd_statistics == "per_domain"
        if self.split is not None:
            self.split.check_size(batch, not per_domain)
            self.split.check_elements(batch, not per_domain)
            return
        if batch.cannot_be_single(per_domain, ranks):
            return  # known from the shapes, without waiting for a GPU
        count = merged.count if per_domain else merged.count.sum(0, keepdim=True)
        single = (count.flatten() == 1).nonzero().flatten().tolist()
        if single:
            which = f"domain {single[0]}" if per_domain and self.num_domains > 1 else "the normalization batch"
            where = f" on all {ranks} ranks together" if ranks > 1 else ""
            raise ValueError(
                f"{type(self).__name__}: expected more than 1 value per channel in training, got 1 in {which}{where}: "
                "use a larger batch or input, or statistics='population'"
            )

    @torch.no_grad()
    def _update_population(self, moments: Moments) -> None:
        """One EMA step for every set of moments that has elements (formulas of Table 5's rows)."""
        if self.running_mean.ndim == 2:
            self._ema_step(moments)
        else:
            for k in range(len(moments.mean)):  # one step each, in order: a shared BatchNorm called K times
                self._ema_step(moments[k])

    def _ema_step(self, moments: Moments) -> None:
        count = moments.count.squeeze(-1)  # () or (K,)
        self.num_batches_tracked += count > 0
        if self.momentum is None:
            step = 1 / self.num_batches_tracked.clamp(min=1).to(count.dtype)
        else:
            step = torch.full_like(count, self.momentum)
        some, several = (torch.where(count >= fewest, step, 0).unsqueeze(-1) for fewest in (1, 2))
        dtype = self.running_mean.dtype
        self.running_mean.lerp_(moments.mean.to(dtype), some.to(dtype))
        self._move_var(moments, several.to(dtype))

    def _move_var(self, moments: Moments, step: Tensor) -> None:
        """One EMA step of the variance; `step` broadcasts against the buffer, and is 0 where there is none."""
        self.running_var.lerp_(moments.unbiased_var().to(step.dtype), step)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Statistics and affine of one domain, `(C,)`, are repeated for each domain of `(K, C)`."""
        for name, own in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
            key = prefix + name
            if name == "num_batches_tracked":
                state_dict.setdefault(key, own)  # absent in checkpoints of frozen layers and of torch < 0.4
            value = state_dict.get(key)
            if value is None or value.shape == own.shape:
                continue
            if own.shape[1:] == value.shape and own.ndim == value.ndim + 1:
                state_dict[key] = value.expand_as(own).clone()  # each domain its own memory, also with assign=True
            elif value.shape[1:] == own.shape and value.ndim == own.ndim + 1:
                choice = "affine" if name in ("weight", "bias") else "population_statistics"
                errors.append(
                    f"{key}: the checkpoint has one per domain, {tuple(value.shape)}, this layer one for all, "
                    f"{tuple(own.shape)}: build it with num_domains={value.shape[0]}, {choice}='per_domain', or select "
                    "one domain's row before loading"
                )
                state_dict[key] = own
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def grouping(self) -> str:
        """How what is normalized together differs from BatchNorm, as options; "" where it does not."""
        return ""

    def extra_repr(self) -> str:
        text = f"{self.num_features}"
        if self.num_domains > 1:
            text += (
                f", num_domains={self.num_domains}, sgd_statistics={self.sgd_statistics!r}, "
                f"population_statistics={self.population_statistics!r}"
            )
        text += f", affine={self.affine!r}, eps={self.eps}, momentum={self.momentum}"
        if self.grouping():
            text += f", {self.grouping()}"
        if self.sync:
            text += ", sync=True"
        if self.example_weight:
            text += f", example_weight={self.example_weight}"
        if self.statistics != "auto":
            text += f", statistics={self.statistics!r}"
        return text


def normalize_in_step(
    layers: Sequence[DomainBatchNorm], inputs: Sequence[Input], domain: int | Tensor | None = None
) -> list[Input]:
    """`[layer(x, domain) for layer, x in zip(layers, inputs)]` with one collective for all layers.

    For layers at the same depth of parallel branches, such as the two towers of RetinaNet's head: their inputs have
    equal `N` and spatial sizes, and the layers the same `num_domains`, `sync` and `statistics`.
    """
    first = layers[0]
    batches = [layer._batch(x, domain) for layer, x in zip(layers, inputs, strict=True)]
    for layer, batch in zip(layers, batches, strict=True):
        if layer.batch_hook is not None:
            layer.batch_hook(layer, batch)
    if not first.uses_minibatch:
        outputs = [layer._population(batch) for layer, batch in zip(layers, batches, strict=True)]
    else:
        local = [batch.by_domain() for batch in batches]
        group = None if isinstance(first.sync, bool) else first.sync
        ranks = world_size(group) if first.sync and first.training else 1
        if ranks > 1:
            _check_in_step(batches)
            widths = [of.mean.shape[1] for of in local]
            means, variances = (torch.cat([getattr(m, name) for m in local], dim=1) for name in ("mean", "var"))
            merged = Moments(local[0].count, means, variances).merge_ranks(group)
            halves = zip(merged.mean.split(widths, 1), merged.var.split(widths, 1), strict=True)
            local = [Moments(merged.count, mean, var) for mean, var in halves]
        if first.training:
            first._check_counts(batches[0], local[0], ranks)
        outputs = [layer._normalize(b, m) for layer, b, m in zip(layers, batches, local, strict=True)]
    return [out if isinstance(x, (list, tuple)) else out[0] for x, out in zip(inputs, outputs, strict=True)]


def _check_in_step(batches: Sequence[DomainBatch]) -> None:
    """One collective carries one count per domain for all layers."""
    shapes = [[(x.shape[0], *x.shape[2:]) for x in batch.tensors] for batch in batches]
    for other in shapes[1:]:
        if other != shapes[0]:
            raise ValueError(f"layers in step take inputs of equal N and spatial sizes, got {shapes[0]} and {other}")


def _of_domain(value: Any, domain: int | Tensor) -> Any:
    """The row(s) of a `(K, C)` tensor that belong to `domain`; a shared `(C,)` belongs to all."""
    return value if value is None or value.ndim == 1 else value[domain]


def _one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} takes one of {list(choices)}, got {value!r}")
