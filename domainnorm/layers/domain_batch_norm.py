"""BatchNorm whose batch is an explicit choice, for inputs from several domains."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..autograd import is_recomputed
from ..distributed.collectives import Group, deepcopy_over_group, world_size
from ..ops.formula import Normalization
from ..ops.moments import Moments
from ..ops.normalize import domain_moments
from .base import AffineChoice, PopulationStatistics, one_of
from .check_tensors import check_tensors
from .inputs import Domain, Domains, Input, LayerInput, Segmentation, spatial_elements
from .normalize_layers import normalize_layers
from .sample_groups import SampleGroups
from .single_element import refuse_single_element

CHOICES = ("shared", "per_domain")


class DomainBatchNorm(PopulationStatistics):
    """Batch normalization over inputs `(N, C, *)` from `num_domains` domains (*Rethinking "Batch"*, §5.2, Table 5).

    A domain is a source of features, such as a pyramid level or a data set. Three independent choices say what the
    domains share. With one domain the layer is `nn.BatchNorm1d/2d/3d`, up to rounding, with the same state dict.

    The domain of an input is always given:

    - `bn([x_1, …, x_K])`: one tensor per domain; sizes may differ, any tensor may be empty; returns a list;
    - `bn(x, domain=k)`: a tensor from domain k;
    - `bn(x, domain=ids)`: a mixed batch, `ids` is a LongTensor `(N,)`;
    - `bn([x_1, …], domain=[d_1, …])`: any number of tensors, each with one of these;
    - `bn(x)`: only with one domain, or inside `dn.use_domain`, for models that cannot pass `domain=`.

    In training, a domain without elements changes no buffer. With `sync`, double backward raises.

    Args:
        num_features: number of channels, C. The other arguments are keyword-only.
        num_domains: number of domains, K.
        sgd_statistics: how training normalizes. `"shared"`: with one mean and variance over the elements of all
            domains; `"per_domain"`: with a mean and variance for each domain.
        population_statistics: how inference normalizes. `"shared"`: with one pair of buffers `(C,)`, updated with the
            merged moments if the SGD statistics are shared, otherwise once per domain, in domain order; `"per_domain"`:
            with buffers `(K, C)`, each domain's updated with its own moments.
        affine: γ and β. `"shared"` or True: `(C,)`; `"per_domain"`: `(K, C)`; None or False: none.
        eps: added to the variance.
        momentum: of the EMA, as in torch; None: cumulative average.
        sync: True merges the moments of all ranks, weighted by their true element counts (exact for uneven and empty
            ranks); a process group merges those of its ranks. In training only. One collective per direction serves all
            domains; see `normalize_layers` for several layers.
        track_running_stats: False: keep no population statistics and always normalize by minibatch statistics.
        track_total_var: whether the layer also keeps `running_total_var`, the average of x² minus `running_mean`²,
            which `example_weight` then mixes with. It is `running_var` plus the variance between batches, which matters
            for small batches. Without it, and in checkpoints of BatchNorm, `running_var` is used instead.
        bias: False: only γ, no β.
        device, dtype: of parameters and buffers.

    Attributes:
        statistics: which statistics normalize. `"auto"`: minibatch in training, population in eval; `"minibatch"`:
            those of the current input, also in eval (no buffer changes then); `"population"`: the buffers, also in
            training (they do not change; γ and β still learn).
        example_weight: α in [0, 1]: how much, in inference under population statistics, a sample's own moments count
            against these (inference example weighing: *Four Things*, §3.1, Eq. 3).
        frozen: if True, `statistics` is `"population"`, whatever it is set to.
        current_domain: the domain of a single tensor that is passed without one; see `dn.use_domain`.
        domain_names: names of the domains, or None. Saved in the state dict, from which domains are loaded by name.
        domains_per_name: how many consecutive domains of the K each name (and each `current_domain`) stands for, such
            as the pyramid levels of a data set.
        batch_hook: None, or a function of the layer and its input that is called before it normalizes.

    Shape:
        - Input: `(N, C, *)`, or a list of such tensors, whose N and `*` may differ
        - Output: same as the input

    Raises:
        ValueError: from the call: the domain is missing or wrong, the shape is wrong, or, in training, a normalization
            batch has exactly one element, as in torch. (With shared SGD and per-domain population statistics, a domain
            with one element does not update its variance. In inference under `"minibatch"`, the output of such an
            element is β.)
        TypeError: from the call: the input is not a dense floating-point tensor.
        RuntimeError: from the call: the layer should normalize by population statistics, but keeps none.

    Example::

        >>> bn = dn.DomainBatchNorm(16, num_domains=2, population_statistics="shared")
        >>> levels = bn([torch.randn(4, 16, 8, 8), torch.randn(4, 16, 4, 4)])
        >>> [tuple(x.shape) for x in levels]
        [(4, 16, 8, 8), (4, 16, 4, 4)]
        >>> bn.eval()(torch.randn(4, 16, 4, 4), domain=1).shape
        torch.Size([4, 16, 4, 4])
    """

    # what a subclass chooses
    is_channel_affine = True  # whether inference under population statistics is one affine of each channel
    sample_groups: SampleGroups | None = None  # groups of samples that training normalizes apart
    channels_per_group = 1  # neighboring channels that are normalized together
    merged_channels = False  # whether the population statistics are those of such channels, too
    channels_per_first_group = 0  # of a GroupNorm that comes first
    channels_per_last_group = 0  # of one that comes last
    is_corrected = True  # whether training is corrected towards the population statistics, where a layer has that

    def __init__(
        self,
        num_features: int,
        *,
        num_domains: int = 1,
        sgd_statistics: str = "per_domain",
        population_statistics: str = "per_domain",
        affine: str | bool | None = "shared",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        sync: "bool | Group" = False,
        track_running_stats: bool = True,
        track_total_var: bool = False,
        bias: bool = True,
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
        one_of("affine", affine, (*CHOICES, True, False, None))
        self.num_features = num_features
        self.num_domains = num_domains
        self.sgd_statistics = sgd_statistics
        self.population_statistics = population_statistics
        self._affine = None if affine in (None, False) else "shared" if affine in (True, "shared") else "per_domain"
        self.track_running_stats = track_running_stats
        self.track_total_var = track_total_var
        self.eps = eps
        self.momentum = momentum
        self.sync = sync
        self.current_domain: Domain | None = None
        self._used: list[Domain] = []  # current domains of the last forward passes
        self._recomputed = False  # since then, by activation checkpointing
        self.batch_hook: Callable[[DomainBatchNorm, LayerInput], None] | None = None

        factory = {"device": device, "dtype": dtype}
        # With one domain, shared and per_domain are the same thing: (C,), as torch.
        self._register_statistics(num_features, factory)
        domains = self._domain_shape(self._affine)
        for name, initial, exists in (("weight", torch.ones, True), ("bias", torch.zeros, bias)):
            value = nn.Parameter(initial(*domains, num_features, **factory)) if self._affine and exists else None
            self.register_parameter(name, value)

    @property
    def affine(self) -> str | None:  # type: ignore[override]
        """`"shared"`, `"per_domain"` or None; its truth value raises unless the layer computes torch's BatchNorm."""
        is_torchs = type(self) is DomainBatchNorm and self.num_domains == 1
        if self._affine is None or (is_torchs and self.statistics == "auto" and not self.example_weight):
            return self._affine
        return AffineChoice(self._affine)

    def forward(self, x: Input, domain: Domains | None = None) -> Input:
        if isinstance(x, fx.Proxy):  # a layer is one node of a symbolic trace
            target = x.tracer.path_of_module(self)
            return x.tracer.create_proxy("call_module", target, (x,) if domain is None else (x, domain), {})
        return normalize_layers([self], [x], domain)[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> "DomainBatchNorm":
        return deepcopy_over_group(self, self.sync, memo)

    def normalization(self, inputs: LayerInput) -> Normalization:
        """Describe which segments of an input are normalized together, and how: what distinguishes the layers."""
        check_tensors(self, inputs.tensors)
        tensors, weight, bias = self._tensors(inputs)
        shared = self.sgd_statistics == "shared"
        elements = self._elements(inputs.tensors)
        minibatch = self.uses_minibatch
        by_sample = not minibatch or self.channels_per_first_group > 0 or self.channels_per_last_group > 0
        if self.sample_groups is not None and minibatch:
            segmentation = self.sample_groups.segmentation(inputs, shared, elements, by_sample)
        else:
            segmentation = inputs.segmentation(by_sample)
        problem = Normalization(
            tensors,
            segmentation.segments,
            inputs.domains,
            segmentation.domains,
            weight,
            bias,
            self.eps,
            shared,
            segmentation.groups,
            self._channels_per_group(tensors),
            self.merged_channels,
            self.channels_per_first_group,
            self.channels_per_last_group,
            inputs.external,
        )
        if not minibatch:
            assert self.running_mean is not None and self.running_var is not None
            problem.example_weight = 0.0 if self.training else self.example_weight
            total = self.running_total_var if problem.example_weight else None
            problem.by_population = (self.running_mean, self.running_var if total is None else total)
        elif self.training:
            self._train(problem, inputs, elements)
        return problem

    def _train(self, problem: Normalization, inputs: LayerInput, elements: list[int]) -> None:
        """What training adds: synchronization, a check of the numbers of elements, and the update of the population."""
        problem.sync = self.sync_group
        if (population := self.population) is not None:
            problem.population = population if inputs.updates else population.copy()
        if self.sample_groups is not None:
            self.sample_groups.check(inputs, problem.shared, elements)
        else:
            refuse_single_element(problem, inputs, elements, type(self).__name__)
        if problem.sync is None and inputs.external is None:
            counted = elements if self.merged_channels else spatial_elements(inputs.tensors)
            together = problem.shared and self.population_statistics == "shared"
            problem.counts = inputs.elements_of_domains(counted, together)

    def moments_of_domains(self, inputs: LayerInput, sets: Segmentation | None = None) -> Moments:
        """This rank's moments `(K, C)` of an input, or of other `sets`, as the population statistics count them."""
        tensors, *_ = self._tensors(inputs)
        segments, domains, _ = sets or inputs.segmentation(self.channels_per_first_group > 0)
        problem = Normalization(tensors, segments, inputs.domains, domains, None, None, self.eps, shared=False)
        problem.channels_per_group, problem.merged_channels = self._channels_per_group(tensors), self.merged_channels
        problem.channels_per_first_group, problem.external = self.channels_per_first_group, inputs.external
        return domain_moments(problem)

    def _tensors(self, inputs: LayerInput) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """The tensors whose channels are normalized, with a weight and a bias for each channel."""
        return inputs.tensors, self.weight, self.bias

    def _channels_per_group(self, tensors: Sequence[Tensor]) -> int:
        """How many neighboring channels of these tensors are normalized together."""
        return self.channels_per_group

    def _restore(self, outputs: list[Tensor], inputs: LayerInput) -> list[Tensor]:
        """Normalized tensors in the shape of the input."""
        return outputs

    def _elements(self, tensors: Sequence[Tensor]) -> list[int]:
        """How many elements one sample of each tensor brings into a normalization batch."""
        return [elements * self.channels_per_group for elements in spatial_elements(tensors)]

    def _input(self, x: Input, domain: Domains | None) -> LayerInput:
        """The input and its domains, once `batch_hook` has seen them."""
        if domain is None and self.current_domain is not None and self.domains_per_name == 1 and isinstance(x, Tensor):
            domain = self.domain_in_use()
        inputs = LayerInput.of(x, domain, self.num_domains, self.num_features)
        if self.batch_hook is not None:
            self.batch_hook(self, inputs)
        return inputs

    def copy_domain_config(self, layer: "DomainBatchNorm") -> None:
        """Copy the domain names and the domain in use from a layer with the same number of domains."""
        if self.num_domains == layer.num_domains:
            self.domain_names, self.domains_per_name = layer.domain_names, layer.domains_per_name
            self.current_domain = layer.current_domain

    def domain_in_use(self) -> Domain:
        """Return `current_domain`.

        Raises:
            ValueError: there is none.
            RuntimeError: activation checkpointing recomputes a forward pass that used another domain.
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

    @property
    def sync_group(self) -> tuple[Group] | None:
        """The process group whose moments the next forward pass merges, `(None,)` for all ranks; None: no merging."""
        group = None if isinstance(self.sync, bool) else self.sync
        merges = self.training and self.sync is not False and self.uses_minibatch and world_size(group) > 1
        return (group,) if merges else None

    def grouping(self) -> str:
        """How the layer groups elements, written as its options; "" if as BatchNorm does."""
        return ""

    def extra_repr(self) -> str:
        words = [str(self.num_features)]
        if self.num_domains > 1:
            words += [f"{k}={getattr(self, k)!r}" for k in ("num_domains", "sgd_statistics", "population_statistics")]
        words += [f"affine={self.affine!r}", f"eps={self.eps}", f"momentum={self.momentum}"]
        words += [self.grouping()] if self.grouping() else []
        given = {name: getattr(self, name) for name in ("sync", "example_weight", "track_total_var")}
        words += [f"{name}={True if name == 'sync' else value}" for name, value in given.items() if value]
        words += [] if self.track_running_stats else ["track_running_stats=False"]
        words += [] if self.statistics == "auto" else [f"statistics={self.statistics!r}"]
        return ", ".join(words)
