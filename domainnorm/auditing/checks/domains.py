"""Domains that one set of statistics misrepresents, that need no sets of their own, or that are far from all."""

from __future__ import annotations

import torch

from ...ops.moments import Moments
from ..divergence import divergence, mean_of, pairwise
from ..finding import Finding, Place
from ..seen import Seen
from ..site import SiteStatistics
from .causes import unknown

ENOUGH = 4  # batches that can be told from others
PAPER = 'Rethinking "Batch", 5.1 and 5.2, Table 4'


def check(seen: Seen) -> list[Finding]:
    """Named sets of batches, sets that only the batches show, and the domains of this library's layers."""
    return [*_named_sets(seen), *_mixed_batches(seen), *_needless(seen), *_far(seen)]


def _named_sets(seen: Seen) -> list[Finding]:
    """Sets of batches in one set of statistics."""
    if len(seen.sources) < 2:
        return []
    places = []
    for site in seen.own:
        sets = [s for name in seen.sources if (s := seen.by_source.get((site, name))) and s.total is not None]
        if len(sets) < 2 or sets[0].norm.mean.shape[0] > 1:
            continue
        mean, var = (torch.cat([getattr(s.own, v) for s in sets]) for v in ("mean", "var"))
        together = Moments(torch.ones_like(mean[:, :1]), mean, var).merge(0)
        values = divergence(mean, var, together.mean, together.var, sets[0].norm.eps)
        for s, value in zip(sets, values, strict=True):
            beyond = mean_of(value) - 2 * mean_of(s.expected(with_average=False))
            places.append(Place(s.norm.name, s.call if site[1] else None, None, beyond, s.source))
    places = sorted((p for p in places if p.value >= seen.thresholds.domains), key=lambda p: -p.value)
    if not places:
        return []
    worst = places[0]
    return [
        Finding(
            "domains",
            "one set of statistics",
            "error" if worst.value >= 5 * seen.thresholds.domains else "warning",
            f"One set of statistics misrepresents the domains: at {worst.layer} those of {worst.source!r} are "
            f"{worst.value:.2g} nats a channel from those of {', '.join(map(repr, seen.sources))} together.",
            worst.value,
            seen.thresholds.domains,
            "nats a channel",
            tuple(places),
            PAPER,
            f"dn.convert_batchnorm(model, 'DomainBatchNorm', num_domains={len(seen.sources)}), then dn.use_domain",
            "DATASETS.DOMAINS, MODEL.NORM_DOMAINS dataset",
        )
    ]


def _mixed_batches(seen: Seen) -> list[Finding]:
    """Batches that differ more than their samples do: each is of another source."""
    if len(seen.sources) > 1 or seen.batches < ENOUGH:
        return []
    places = []
    for s in seen.inference.values():  # minibatch statistics of the layers before would make the batches alike
        whole = all(size.samples <= size.images for size in s.sizes)
        # the features of large images are others, those of a coarse level most of all
        alike = len({size.elements / size.samples for size in s.sizes if size.samples}) == 1
        if s.total is not None and s.norm.follows_batches and whole and alike and s.samples >= 2 * len(s.sizes):
            value = s.between_batches() / s.between_batches_by_chance()
            places.append(Place(s.norm.name, s.call if s.call else None, None, value))
    places = sorted((p for p in places if p.value >= seen.thresholds.mixed_batches), key=lambda p: -p.value)
    if not places:
        return []
    worst = places[0]
    return [
        Finding(
            "domains",
            "batches of different sources",
            "warning",
            f"The batches are no random samples of one set: at {worst.layer} their means vary {worst.value:.2g} times "
            "as much as those of random batches ever would. Training normalizes each source by its own statistics, "
            "inference all by one average.",
            worst.value,
            seen.thresholds.mixed_batches,
            "times the variance",
            tuple(places),
            'Rethinking "Batch", 5.1 and 6.2, Fig. 8',
            "shuffle the samples of all sources; or dn.audit(model, {name: batches, …}) to see them apart",
            "DATALOADER.BATCHES iid",
        )
    ]


def _by_domain(sites: list[SiteStatistics]) -> list[list[SiteStatistics]]:
    """The sites of each call that has several domains."""
    calls = {s.call: [other for other in sites if other.call == s.call] for s in sites}
    return [own for own in calls.values() if len(own) > 1]


def _needless(seen: Seen) -> list[Finding]:
    """Separate statistics of domains that are alike everywhere."""
    places = []
    for _, norm, sites in seen.layers():
        if norm.mean.shape[0] == 1 or norm.frozen:
            continue
        for own in _by_domain(sites):
            mean, var = (torch.cat([getattr(s.own, v) for s in own]) for v in ("mean", "var"))
            places.append(Place(norm.name, value=float(pairwise(mean, var, norm.eps).max())))
    places.sort(key=lambda p: -p.value)
    if not places or places[0].value > seen.thresholds.separate:
        return []
    worst = places[0]
    return [
        Finding(
            "domains",
            "separate where shared would do",
            "note",
            f"All {len(places)} layers with separate statistics of domains could share them: the domains are at most "
            f"{worst.value:.2g} nats a channel apart, at {worst.layer}.",
            worst.value,
            seen.thresholds.separate,
            "nats a channel",
            tuple(places),
            PAPER,
            "dn.merge_domains(model)",
            "MODEL.RETINANET.POPULATION_STATISTICS shared",
        )
    ]


def _far(seen: Seen) -> list[Finding]:
    """Inputs that are unlike all domains that a layer knows."""
    places = []
    for _, norm, sites in seen.layers():
        for s, value, nearest in unknown(seen, norm, sites):
            places.append((Place(norm.name, s.call if s.call else None, s.domain, value), nearest))
    places.sort(key=lambda pair: -pair[0].value)
    if not places:
        return []
    worst, nearest = places[0]
    return [
        Finding(
            "domains",
            "far from all",
            "error" if worst.value >= 2 * seen.thresholds.far_domain else "warning",
            f"What {worst.layer} is given as domain {worst.domain} is like none that it knows: {worst.value:.2g} nats "
            f"a channel from domain {nearest}, the nearest. It is a new domain, or the statistics of domain "
            f"{worst.domain} are of something else.",
            worst.value,
            seen.thresholds.far_domain,
            "nats a channel",
            tuple(place for place, _ in places),
            PAPER,
            "dn.add_domain(model, batches, name), or dn.recompute_population_statistics(model, batches)",
            "TEST.RECOMPUTE.DATASET",
        )
    ]
