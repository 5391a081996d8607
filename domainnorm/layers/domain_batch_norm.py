"""BatchNorm whose batch is an explicit choice, for inputs from several domains."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batches import Affine
from ..distributed import Group, deepcopy_over_group
from ..kernels import compiled, kernel
from ..kernels.compiled_batches import Batches, Towards
from ..moments import Moments, Rows, is_recomputed
from .domains import Domain, DomainBatch, Domains, Input, of_domain
from .in_step import normalize
from .population_statistics import PopulationStatistics, one_of
from .split import Split

CHOICES = ("shared", "per_domain")


class DomainBatchNorm(PopulationStatistics):
    """Batch normalization over inputs `(N, C, *)` of `num_domains` domains (*Rethinking "Batch"*, §5.2, Table 5).

    A domain is a source of features: a pyramid level, a data set. What is shared between domains is three
    independent choices. With one domain it is `nn.BatchNorm1d/2d/3d`, to rounding, with the same state dict.

    The domain of an input is always said:

    - `bn([x_1, …, x_K])`: one tensor per domain, any of them may be empty, sizes may differ; returns a list;
    - `bn(x, domain=k)`: a tensor of domain k;
    - `bn(x, domain=ids)`: a mixed batch, `ids` a LongTensor `(N,)`;
    - `bn([x_1, …], domain=[d_1, …])`: any number of tensors, each with one of these;
    - `bn(x)`: only with one domain, or within `dn.use_domain`, for models that cannot say it.

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
        current_domain: the domain of a single tensor for which none is said; see `dn.use_domain`.
        domain_names: of the domains; None: they have none. In the state dict, which is loaded by name.
        domains_per_name: how many of the K domains each name (and each `current_domain`) stands for, one after the
            other: the pyramid levels of a data set.
        batch_hook: None, or a function of the layer and its input, called before it normalizes.

    In training a domain without elements changes no buffer, and a normalization batch of exactly one element is a
    ValueError, as in torch (with shared SGD and per-domain population statistics, a domain of one element updates
    its mean only). In inference under `"minibatch"` such an element becomes β. Double backward works without
    `sync`, and raises with it.
    """

    plain = True  # whether each normalization batch is normalized as nn.BatchNorm2d does
    per_channel = True  # whether inference under population statistics is one affine of each channel
    channels_together = (1, 0)  # neighbours in a normalization batch (0: not of whole channels); in a GroupNorm before
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
        one_of("sgd_statistics", sgd_statistics, CHOICES)
        one_of("population_statistics", population_statistics, CHOICES)
        one_of("affine", affine, (*CHOICES, None))
        self.num_features = num_features
        self.num_domains = num_domains
        self.sgd_statistics = sgd_statistics
        self.population_statistics = population_statistics
        self.affine = affine
        self.eps = eps
        self.momentum = momentum
        self.sync = sync
        self.current_domain: Domain | None = None
        self._used: list[Domain] = []  # current domains of the last forward passes
        self._recomputed = False  # since then, by activation checkpointing
        self.batch_hook: Callable[[DomainBatchNorm, DomainBatch], None] | None = None

        factory = {"device": device, "dtype": dtype}
        # With one domain, shared and per_domain are the same thing: (C,), as torch.
        self._register_statistics(num_features, factory)
        domains = (num_domains,) if affine == "per_domain" and num_domains > 1 else ()
        for name, initial in (("weight", torch.ones), ("bias", torch.zeros)):
            value = None if affine is None else nn.Parameter(initial(*domains, num_features, **factory))
            self.register_parameter(name, value)

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def forward(self, x: Input, domain: Domains | None = None) -> Input:
        outputs = normalize(self, self._batch(x, domain))
        return outputs if isinstance(x, (list, tuple)) else outputs[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> "DomainBatchNorm":
        return deepcopy_over_group(self, self.sync, memo)

    # What another layer is made of: which moments its statistics count, and how it normalizes by given ones.

    def _read(self, tensors: list[Tensor]) -> tuple[Rows, Moments]:
        """The rows of `tensors`, and the moments `(ΣN, …)` that the statistics count of them."""
        rows = Rows(tensors)
        return rows, rows.moments

    def _elements(self, x: Tensor) -> int:
        """How many numbers a row brings into a normalization batch."""
        return math.prod(x.shape[2:])

    def _normalize_by(self, rows: Rows, of: Moments, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
        """The rows normalized by moments like the counted ones, broadcasting against them; of each tensor."""
        return rows.normalize(of, weight, bias, self.eps)

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

    def _affine(self, batch: DomainBatch) -> Affine:
        """γ and β of all rows."""
        return self._of_rows(self.weight, batch), self._of_rows(self.bias, batch)

    def _corrected(self, affine: Affine, batch: DomainBatch, merged: Moments, of: Moments) -> Affine:
        """γ and β where what is normalized by the moments `of` of rows, `merged` of domains, is corrected."""
        return affine

    def _towards(self, batch: DomainBatch, batches: Batches) -> Towards | None:
        """What whole batches are corrected towards."""
        return None

    def _remember(self, mean: Tensor) -> None:
        """Called with the batch's mean, before the statistics move."""

    def _of_rows(self, value: Any, batch: DomainBatch) -> Any:
        """Of something `(C,)` for all domains, or `(K, C)`, what broadcasts against the rows `(ΣN, C)`."""
        return value if value is None or value.ndim == 1 else batch.of_rows(value)

    def _batch(self, x: Input, domain: Domains | None) -> DomainBatch:
        """The input and its domains, once `batch_hook` has seen them."""
        if domain is None and self.current_domain is not None and self.domains_per_name == 1 and isinstance(x, Tensor):
            domain = self.domain_in_use()
        batch = DomainBatch.of(x, domain, self.num_domains, self.num_features, self._read, self._elements)
        if self.batch_hook is not None:
            self.batch_hook(self, batch)
        return batch

    def take_domains(self, layer: "DomainBatchNorm") -> None:
        """The domains of a layer that has as many: their names, and which one is in use."""
        if self.num_domains == layer.num_domains:
            self.domain_names, self.domains_per_name = layer.domain_names, layer.domains_per_name
            self.current_domain = layer.current_domain

    def domain_in_use(self) -> Domain:
        """The `current_domain`.

        Raises:
            ValueError: there is none.
            RuntimeError: activation checkpointing meets another one than in the forward pass that it recomputes.
        """
        if self.current_domain is None:
            raise ValueError(f"{type(self).__name__}: dn.use_domain has not said which of the domains this is")
        if torch.compiler.is_compiling():
            return self.current_domain
        if not is_recomputed():
            if self._recomputed or not self.training:  # what was used before has had its backward pass
                self._used, self._recomputed = [], False
            if not any(used is self.current_domain for used in self._used):
                self._used.append(self.current_domain)
        elif [id(used) for used in self._used] != [id(self.current_domain)]:
            raise RuntimeError(
                "activation checkpointing runs the layer again after use_domain changed its domain: let one domain "
                "be in use from the forward to the backward pass, or pass domain= to the layer"
            )
        else:
            self._recomputed = True
        return self.current_domain

    def _population(self, batch: DomainBatch) -> list[Tensor]:
        """Normalized by the buffers, in inference with the samples' own moments by `example_weight`."""
        values = (self.running_mean, self.running_var, self.weight, self.bias)
        if self.example_weight > 0 and not self.training:
            mean, var, weight, bias = (self._of_rows(v, batch) for v in values)
            if self.channels_together == (1, 0) and kernel(batch.tensors) is compiled:
                return compiled.weighed(batch.tensors, self.example_weight, mean, var, weight, bias, self.eps)
            return self._normalize_by(batch.rows, self._weighed(batch.counted, mean, var), weight, bias)
        return [
            self._normalize_fixed(x, *(of_domain(v, domain) for v in values))
            for x, domain in zip(batch.tensors, batch.domains, strict=True)
        ]

    def _weighed(self, own: Moments, mean: Tensor, var: Tensor) -> Moments:
        """Eq. 3: the union of the sample's own moments and the population's, by the weights α and 1 - α."""
        mean, var = (v.to(own.mean.dtype).expand_as(own.mean) for v in (mean, var))
        # filled, not copied from the processor, for which a GPU would wait
        alpha = self.example_weight
        shares = torch.stack([own.mean.new_full((1, 1), share) for share in (alpha, 1 - alpha)])
        return Moments(shares, torch.stack([own.mean, mean]), torch.stack([own.var, var])).merge(0)[0]

    def _merge(self, batch: DomainBatch) -> Moments:
        """The moments of each domain, `(K, C)`, on this rank; or of all, `(1, C)`, where no more is asked for."""
        return batch.together() if self.sgd_statistics == self.population_statistics == "shared" else batch.by_domain()

    def _normalize(self, batch: DomainBatch, merged: Moments) -> list[Tensor]:
        """Normalized by the moments that `_merge` gives, over all ranks; updates the buffers."""
        shared = self.sgd_statistics == "shared"
        total = merged.merge(0) if shared and len(merged.mean) > 1 else merged  # (1, C) or (K, C)
        if self.split is not None:
            of = self.split.merge(batch, shared)  # (ΣN, C)
        else:
            of = total if len(total.mean) == 1 else batch.of_rows(total)
        affine = self._corrected(self._affine(batch), batch, merged, of)
        outputs = self._normalize_by(batch.rows, of, *affine)
        if self.training and batch.updates:
            self._update_population(total if self.population_statistics == "shared" else merged)
        return outputs

    def _check_counts(self, batch: DomainBatch, counts: Callable[[], list[float]], ranks: int) -> None:
        """A normalization batch of one element has no variance: ValueError, on every rank alike.

        Args:
            counts: the elements of each domain, or of all; to know them, a GPU may have to be waited for.
        """
        per_domain = self.sgd_statistics == "per_domain"
        if self.split is not None:
            self.split.check_size(batch, not per_domain)
            self.split.check_elements(batch, not per_domain)
            return
        if batch.cannot_be_single(per_domain, ranks):
            return  # known from the shapes
        of = counts() if per_domain else [sum(counts())]
        if 1 in of:
            which = f"domain {of.index(1)}" if per_domain and self.num_domains > 1 else "the normalization batch"
            where = f" on all {ranks} ranks together" if ranks > 1 else ""
            raise ValueError(
                f"{type(self).__name__}: expected more than 1 value per channel in training, got 1 in {which}{where}: "
                "use a larger batch or input, or statistics='population'"
            )

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
