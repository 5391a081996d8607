"""All that the passes over the batches have shown: what the checks look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..distributed import world_size
from ..layers import DomainBatchNorm
from ..ops.moments import Moments
from .divergence import mean_of
from .finding import Thresholds
from .leak import Leak
from .norms import Norm
from .observe import Site
from .outputs import Change
from .site import SiteStatistics


@dataclass
class Propagated:
    """The mean squared change of normalized values at one site, with all layers before switched, too."""

    total: float = 0.0
    batches: int = 0

    @property
    def value(self) -> float:
        return self.total / self.batches if self.batches else float("nan")


@dataclass
class Seen:
    """What was measured.

    Attributes:
        model: as it was given.
        norms: its layers with running statistics.
        thresholds: from which on a figure is a finding.
        own: of each site, what came in while all layers normalized by minibatch statistics, as in training: a layer's
            own fault is not one of a layer before it. In the order in which the sites were reached.
        inference: of each site, the divergence from the running statistics under population statistics.
        propagated: of each site.
        output: change of the model's output between population and minibatch statistics.
        alone: of a layer's number, the change of the output where this layer alone normalizes by minibatches.
        sources: names of the sets of batches, or `[""]`.
        by_source: as `own`, of each of several sets.
        samples: how many were given, and in how many batches.
        passes: forward passes over all batches.
        optimizer, accumulate: as given.
        exact: of each site, the moments `(1, C)` of all batches, where each layer before it normalizes by those of all.
        leak: what mixed batches have shown; None: not asked for.
        ranks: of each rank, what layers have there; one entry without processes.
        empty: names of layers that got a batch without elements.
        model_training: whether the model was in training mode.
    """

    model: nn.Module
    norms: list[Norm]
    thresholds: Thresholds
    own: dict[Site, SiteStatistics] = field(default_factory=dict)
    inference: dict[Site, SiteStatistics] = field(default_factory=dict)
    propagated: dict[Site, Propagated] = field(default_factory=dict)
    output: Change = field(default_factory=Change)
    alone: dict[int, float] = field(default_factory=dict)
    sources: list[str] = field(default_factory=lambda: [""])
    by_source: dict[tuple[Site, str], SiteStatistics] = field(default_factory=dict)
    samples: int = 0
    batches: int = 0
    passes: int = 0
    optimizer: torch.optim.Optimizer | None = None
    accumulate: int = 1
    exact: dict[Site, Moments] = field(default_factory=dict)
    leak: Leak | None = None
    ranks: list[Mapping[str, Any]] = field(default_factory=list)
    model_training: bool = False

    def sites(self, k: int) -> list[SiteStatistics]:
        """Those of a layer that got elements, by call and domain."""
        found = [(site, s) for site, s in self.own.items() if site[0] == k and s.total is not None]
        return [statistics for _, statistics in sorted(found, key=lambda item: item[0])]

    def layers(self) -> Iterator[tuple[int, Norm, list[SiteStatistics]]]:
        """Each layer that was reached, in the order of the forward pass."""
        order = dict.fromkeys(site[0] for site in self.own)
        for k in order:
            if sites := self.sites(k):
                yield k, self.norms[k], sites

    def divergence_in_inference(self, site: Site) -> float:
        """Divergence of what a site is given under population statistics from the running statistics.

        0 where the site was not reached. Errors of layers before it are in it, too.
        """
        found = self.inference.get(site)
        return 0.0 if found is None or found.total is None else mean_of(found.drift())

    def ranks_of(self, norm: Norm) -> int:
        """How many ranks a layer's normalization batches are of."""
        module = norm.module
        if isinstance(module, DomainBatchNorm):
            return world_size(None if module.sync is True else module.sync) if module.sync else 1
        return world_size(module.process_group) if isinstance(module, nn.SyncBatchNorm) else 1

    @property
    def not_reached(self) -> list[str]:
        """Names of layers that no batch came to."""
        reached = {site[0] for site, s in self.own.items() if s.total is not None or s.not_finite}
        return [norm.name for k, norm in enumerate(self.norms) if k not in reached]
