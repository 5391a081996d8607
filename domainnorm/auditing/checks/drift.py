"""Running statistics that are not those of the batches."""

from __future__ import annotations

import torch

from ...ops.moments import Moments
from ..divergence import divergence, mean_of
from ..finding import Finding, Place, counted, norm_key
from ..norms import Norm
from ..seen import Seen
from ..site import SiteStatistics
from .causes import explained

RECOMPUTE = "dn.recompute_population_statistics(model, batches)"
KEYS = 'TEST.STATISTICS "[population, recomputed]", TEST.RECOMPUTE.IN_CHECKPOINT True'


def check(seen: Seen) -> list[Finding]:
    """Layers that follow their batches, and frozen ones, apart."""
    moving, constant, others = [], [], explained(seen)
    for k, norm, sites in seen.layers():
        value = drift_of(seen, k, norm, sites)
        if norm.frozen and norm.name not in others:
            constant.append(Place(norm.name, value=value))
        elif norm.follows_batches and norm.name not in others:
            moving.append(Place(norm.name, value=value))
    found = []
    if places := _above(moving, seen.thresholds.drift):
        worst, exact = places[0], "exact " if seen.exact else ""
        found.append(
            Finding(
                "drift",
                "statistics lag",
                "error" if worst.value >= 5 * seen.thresholds.drift else "warning",
                f"The running statistics of {len(places)} of {counted(len(moving), 'layer')} are not the "
                f"{exact}statistics of these batches: those of {worst.layer} are {worst.value:.2g} nats a channel "
                f"away, beyond what sampling {seen.samples} samples explains.",
                worst.value,
                seen.thresholds.drift,
                "nats a channel",
                tuple(places),
                'Rethinking "Batch", 3.2, Table 1',
                RECOMPUTE,
                KEYS,
            )
        )
    if places := _above(constant, seen.thresholds.frozen_drift):
        worst = places[0]
        found.append(
            Finding(
                "drift",
                "frozen statistics do not fit",
                "warning",
                f"Constants of {counted(len(places), 'frozen layer')} are far from what is normalized by them: those "
                f"of {worst.layer} are {worst.value:.2g} nats a channel away from these batches.",
                worst.value,
                seen.thresholds.frozen_drift,
                "nats a channel",
                tuple(places),
                'Rethinking "Batch", 4.3',
                f"thaw the layers and {RECOMPUTE}; or load the weights that they belong to",
                f"{norm_key(worst.layer)} BN, MODEL.WEIGHTS",
            )
        )
    return found


def drift_of(seen: Seen, k: int, norm: Norm, sites: list[SiteStatistics]) -> float:
    """Divergence of a layer's batches from its running statistics, less what chance explains, the worst domain's.

    Calls that share running statistics are compared with what an average over the calls would be.
    """
    values = []
    for row in range(norm.mean.shape[0]):
        own = [s for s in sites if norm.row(s.domain) == row]
        if not own:
            continue
        moments = [seen.exact.get((k, s.call, s.domain), s.own) for s in own]
        mean, var = (torch.cat([getattr(m, v) for m in moments]) for v in ("mean", "var"))
        if norm.shared_sgd:
            merged = Moments(torch.cat([m.count for m in moments]), mean, var).merge(0)
            mean, var = merged.mean, merged.var
        chance = sum(mean_of(s.expected()) for s in own) / len(own)
        running = norm.mean[row : row + 1], norm.var[row : row + 1]
        together = Moments(torch.ones_like(mean[:, :1]), mean, var).merge(0)
        average = mean.mean(0, keepdim=True), var.mean(0, keepdim=True)
        ways = [divergence(*way, *running, norm.eps) for way in ((together.mean, together.var), average)]
        values.append(max(0.0, min(mean_of(way) for way in ways) - 2 * chance))
    return max(values, default=0.0)


def _above(places: list[Place], threshold: float) -> list[Place]:
    return sorted((place for place in places if place.value >= threshold), key=lambda place: -place.value)
