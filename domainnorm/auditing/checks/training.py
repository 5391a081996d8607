"""Gradient accumulation, activation checkpointing, averaged weights and weight decay, as they affect norms."""

from __future__ import annotations

import statistics
from collections import Counter

from ..divergence import mean_of
from ..finding import Finding, Place, counted
from ..seen import Seen
from .causes import in_average
from .drift import RECOMPUTE, drift_of

ENOUGH = 16  # samples that need no accumulation


def check(seen: Seen) -> list[Finding]:
    """One after the other."""
    return [*_accumulation(seen), *_updated_twice(seen), *_averaged(seen), *_decay(seen)]


def _accumulation(seen: Seen) -> list[Finding]:
    if seen.accumulate < 2:
        return []
    places = []
    for _, norm, sites in seen.layers():
        if norm.follows_batches and not norm.is_corrected:
            samples = min(statistics.median(z.independent for z in s.sizes if z.elements) for s in sites)
            if samples * seen.ranks_of(norm) < ENOUGH:
                places.append(Place(norm.name, value=float(samples)))
    if not places:
        return []
    places.sort(key=lambda p: p.value)
    worst = places[0]
    return [
        Finding(
            "training",
            "accumulation",
            "warning",
            f"Gradients are accumulated over {seen.accumulate} passes, but each normalizes alone: {worst.layer} has "
            f"{worst.value:g} samples in a normalization batch, not {worst.value * seen.accumulate:g}.",
            worst.value,
            float(ENOUGH),
            "samples",
            tuple(places),
            'Rethinking "Batch", App. A.5',
            "dn.virtual_batch(model, images), larger batches, or dn.convert_batchnorm(model, 'BatchRenorm')",
            "SOLVER.VIRTUAL_BATCH, SOLVER.ACCUMULATE 1",
        )
    ]


def _updated_twice(seen: Seen) -> list[Finding]:
    """Layers with twice as many updates for each call as the others: activation checkpointing runs them again."""
    counts = {}
    for _, norm, sites in seen.layers():
        if norm.tracked and norm.follows_batches and not norm.ours:
            counts[norm.name] = norm.tracked / len({s.call for s in sites})
    if len(set(counts.values())) < 2:
        return []
    steps = min(Counter(counts.values()).most_common(2), key=lambda item: item[0])[0]
    places = [Place(name, value=2.0) for name, count in counts.items() if count == 2 * steps]
    if not places:
        return []
    return [
        Finding(
            "training",
            "updated twice",
            "warning",
            f"Two updates of the running statistics a step: {counted(len(places), 'layer')}, such as "
            f"{places[0].layer}: activation checkpointing runs them again in the backward pass, as with twice the "
            "momentum.",
            2.0,
            1.0,
            "updates a step",
            tuple(places),
            'Rethinking "Batch", 3.1',
            "dn.convert_batchnorm(model, 'DomainBatchNorm'), whose layers update once; or half the momentum",
            "MODEL.BACKBONE.NORM BN",
        )
    ]


def _averaged(seen: Seen) -> list[Finding]:
    """Averaged weights with statistics of other weights."""
    places = []
    for k, norm, sites in seen.layers():
        if not in_average(seen, norm):
            continue
        lag = max(seen.divergence_in_inference((k, s.call, s.domain)) - 2 * mean_of(s.expected()) for s in sites)
        if (value := max(lag, drift_of(seen, k, norm, sites))) >= seen.thresholds.drift / 2:
            places.append(Place(norm.name, value=value))
    if not places:
        return []
    places.sort(key=lambda p: -p.value)
    worst = places[0]
    return [
        Finding(
            "training",
            "averaged weights",
            "error" if worst.value >= 5 * seen.thresholds.drift else "warning",
            f"The weights are averages, the running statistics are those of other weights: at {worst.layer} they are "
            f"{worst.value:.2g} nats a channel from these batches.",
            worst.value,
            seen.thresholds.drift / 2,
            "nats a channel",
            tuple(places),
            'Rethinking "Batch", 3.3',
            RECOMPUTE,
            "SOLVER.AVERAGE_WEIGHTS EMA (or SWA), which recomputes them",
        )
    ]


def _decay(seen: Seen) -> list[Finding]:
    """Weight decay of γ and β that no gradient reaches."""
    if seen.optimizer is None:
        return []
    decayed = {id(p) for g in seen.optimizer.param_groups if g.get("weight_decay") for p in g["params"]}
    places = [
        Place(f"{norm.name}.{name}", value=1.0)
        for norm in seen.norms
        for name, p in norm.module.named_parameters(recurse=False)
        if id(p) in decayed and not p.requires_grad
    ]
    if not places:
        return []
    return [
        Finding(
            "training",
            "decay without effect",
            "note",
            f"Weight decay is set for {len(places)} parameters of norms that do not learn, such as {places[0].layer}: "
            "an optimizer passes over parameters without gradients.",
            float(len(places)),
            1.0,
            "parameters",
            tuple(places),
            "Four Things, 3.3",
            "leave them out of the optimizer: [p for p in model.parameters() if p.requires_grad]",
            "SOLVER.WEIGHT_DECAY_NORM 0",
        )
    ]
