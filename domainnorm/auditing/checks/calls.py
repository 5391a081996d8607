"""Calls, or domains, that training normalizes by other statistics than inference (rows 3 and 2 of Table 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.moments import Moments
from ..divergence import alike, divergence, mean_of, pairwise, ranges
from ..finding import Finding, Place
from ..norms import Norm
from ..seen import Seen
from ..site import SiteStatistics


def check(seen: Seen) -> list[Finding]:
    """Apart in training and together in inference, and the reverse."""
    return [*_shared_statistics(seen), *_shared_batches(seen)]


def _shared_statistics(seen: Seen) -> list[Finding]:
    """Layers whose calls, or domains, training normalizes apart and inference by the same statistics."""
    places: list[Place] = []
    distances: dict[str, float] = {}
    for k, norm, sites in seen.layers():
        if norm.follows_batches and is_shared_by_calls(norm, sites):
            for s, distance in zip(sites, away(sites), strict=True):
                value = max(mean_of(s.drift()), seen.divergence_in_inference((k, s.call, s.domain)))
                if min(distance, value) >= seen.thresholds.calls:
                    places.append(Place(norm.name, *where(norm, s), value))
                    distances[norm.name] = max(distance, distances.get(norm.name, 0.0))
    places.sort(key=lambda place: -place.value)
    if not places:
        return []
    worst = places[0]
    groups = {name: _groups(seen, name) for name in distances}
    several = "; ".join(ranges(group) for group in groups[worst.layer])
    word = "domain" if worst.call is None else "call"
    number = sum(len(group) for group in groups[worst.layer])
    has = f"is called {number} times"
    remedy = f"dn.DomainBatchNorm(num_features, num_domains={number}), called with the list of inputs"
    if word == "domain":
        has = f"has {number} domains"
        remedy = "dn.DomainBatchNorm(…, population_statistics='per_domain'), and recomputed statistics"
    return [
        Finding(
            "calls",
            "shared statistics",
            "error" if worst.value >= 3 * seen.thresholds.calls else "warning",
            f"{worst.layer} {has} in a forward pass. Training normalizes each {word} by its own "
            f"statistics, inference all by the same running statistics: what {word} "
            f"{worst.domain if worst.call is None else worst.call} is given is {worst.value:.2g} nats a channel away "
            f"from them, and one {word} up to {distances[worst.layer]:.2g} from all together. Alike are the {word}s "
            f"{several}.",
            worst.value,
            seen.thresholds.calls,
            "nats a channel",
            tuple(places),
            'Rethinking "Batch", 5.2, Table 5, row 3',
            remedy,
            "MODEL.RETINANET.POPULATION_STATISTICS per_domain",
            {"alike": groups, "distance": distances},
        )
    ]


def _shared_batches(seen: Seen) -> list[Finding]:
    """Layers that training normalizes by the moments of all domains together, and inference by those of each."""
    places = []
    for _, norm, sites in seen.layers():
        if not (norm.follows_batches and norm.shared_sgd and norm.mean.shape[0] > 1):
            continue
        for call in {s.call for s in sites}:
            own = [s for s in sites if s.call == call]
            whole = Moments.cat([s.own for s in own]).merge(0)
            for s in own:
                ways = [divergence(*m, whole.mean, whole.var, norm.eps) for m in ((s.own.mean, s.own.var), s.running)]
                value = min(mean_of(way) for way in ways) - 2 * mean_of(s.expected())
                places.append(Place(norm.name, call or None, s.domain, value))
    places = sorted((p for p in places if p.value >= seen.thresholds.calls), key=lambda p: -p.value)
    if not places:
        return []
    worst = places[0]
    return [
        Finding(
            "calls",
            "shared batches",
            "error" if worst.value >= 3 * seen.thresholds.calls else "warning",
            f"Training normalizes all domains of {worst.layer} together, inference each by statistics of its own: "
            f"those of domain {worst.domain} are {worst.value:.2g} nats a channel away from those of training.",
            worst.value,
            seen.thresholds.calls,
            "nats a channel",
            tuple(places),
            'Rethinking "Batch", 5.2, Table 5, row 2',
            "layer.sgd_statistics = 'per_domain', and go on training; or population_statistics='shared'",
            "MODEL.RETINANET.SGD_STATISTICS per_domain",
        )
    ]


def is_shared_by_calls(norm: Norm, sites: list[SiteStatistics]) -> bool:
    """Whether several calls, or domains that training keeps apart, have one set of running statistics."""
    calls = {s.call for s in sites}
    domains = {s.domain for s in sites}
    return len(calls) > 1 or (len(domains) > 1 and norm.mean.shape[0] == 1 and not norm.shared_sgd)


def away(sites: list[SiteStatistics]) -> list[float]:
    """How far the statistics of each are from those of all together, which no better average could repair."""
    mean, var = (torch.cat([getattr(s.own, v) for s in sites]) for v in ("mean", "var"))
    weights = torch.ones_like(mean[:, :1])  # an average of calls counts each alike, whatever its size
    all_of_them = Moments(weights, mean, var).merge(0)
    values = divergence(mean, var, all_of_them.mean, all_of_them.var, sites[0].norm.eps)
    chance = torch.stack([s.expected(with_average=False) for s in sites])
    return [max(0.0, mean_of(v) - 2 * mean_of(c)) for v, c in zip(values, chance, strict=True)]


def where(norm: Norm, site: SiteStatistics) -> tuple[int | None, int | None]:
    """Call and domain, of a layer that has several, where they tell something apart."""
    return (None, site.domain) if norm.ours and norm.module.num_domains > 1 else (site.call, None)  # type: ignore[operator]


def _groups(seen: Seen, name: str) -> list[list[int]]:
    """Numbers of the calls, or domains, of a layer in groups that are alike."""
    sites = next(sites for _, norm, sites in seen.layers() if norm.name == name)
    mean, var = (torch.cat([getattr(s.own, v) for s in sites]) for v in ("mean", "var"))
    distances: Tensor = pairwise(mean, var, sites[0].norm.eps)
    numbers = [s.call if len({s.call for s in sites}) > 1 else s.domain for s in sites]
    return [[numbers[k] for k in group] for group in alike(distances, seen.thresholds.calls)]
