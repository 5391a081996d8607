"""Statistics that are not finite, or too imprecise to normalize by."""

from __future__ import annotations

import torch

from ..finding import Finding, Place
from ..norms import Norm
from ..seen import Seen
from ..site import SiteStatistics

_HALF = (torch.float16, torch.bfloat16)


def check(seen: Seen) -> list[Finding]:
    """NaN, half-precision statistics, large means, dead channels."""
    return [*_not_finite(seen), *_half(seen), *_large_means(seen), *_dead(seen)]


def _not_finite(seen: Seen) -> list[Finding]:
    buffers = [Place(norm.name, value=bad) for norm in seen.norms if (bad := _bad_statistics(norm))]
    inputs = [
        Place(s.norm.name, s.call if s.call else None, None, float(s.not_finite))
        for s in seen.own.values()
        if s.not_finite
    ]
    found = []
    if buffers:
        found.append(
            Finding(
                "numerics",
                "broken statistics",
                "error",
                f"The running statistics of {len(buffers)} layers are no numbers, or variances below 0: those of "
                f"{buffers[0].layer} in {buffers[0].value:.0f} channels. All that these layers predict from is NaN.",
                buffers[0].value,
                1.0,
                "channels",
                tuple(sorted(buffers, key=lambda p: -p.value)),
                'Rethinking "Batch", 3.2',
                "layer.reset_running_stats(), then dn.recompute_population_statistics(model, batches)",
                "TEST.RECOMPUTE.IN_CHECKPOINT True",
            )
        )
    if inputs and not buffers:
        found.append(
            Finding(
                "numerics",
                "NaN",
                "error",
                f"NaN or infinity reaches {inputs[0].layer} first, in {inputs[0].value:.0f} of {seen.batches} batches: "
                "one such batch makes the running statistics NaN for ever.",
                inputs[0].value,
                1.0,
                "batches",
                tuple(inputs),
                'Rethinking "Batch", 3.2',
                "torch.nn.utils.clip_grad_norm_, a lower learning rate, or look at what comes before that layer",
                "SOLVER.CLIP_GRADIENTS.ENABLED True, SOLVER.BASE_LR",
            )
        )
    return found


def _bad_statistics(norm: Norm) -> float:
    bad = ~(norm.mean.isfinite() & norm.var.isfinite()) | (norm.var < 0)
    return float(bad.sum())


def _half(seen: Seen) -> list[Finding]:
    places = []
    for norm in seen.norms:
        dtype = norm.dtype
        if dtype in _HALF:
            places.append(Place(norm.name, value=float(torch.finfo(dtype).eps)))
    if not places:
        return []
    places.sort(key=lambda p: -p.value)
    worst, momentum = places[0], seen.norms[0].momentum or 0.1
    return [
        Finding(
            "numerics",
            "half-precision statistics",
            "error",
            f"{len(places)} layers keep their running statistics in half precision, such as {worst.layer}: they are "
            f"rounded to {100 * worst.value:.2g}%, and a step of the average below that, {100 * momentum:.2g}% of the "
            "difference, is lost.",
            worst.value,
            float(torch.finfo(torch.float32).eps),
            "rounding",
            tuple(places),
            'Rethinking "Batch", 3.1',
            "norm.float() of each norm, and torch.autocast instead of model.half()",
            "SOLVER.AMP.ENABLED True",
        )
    ]


def _large_means(seen: Seen) -> list[Finding]:
    places = []
    for s in seen.own.values():
        if s.total is None:
            continue
        places.append(Place(s.norm.name, s.call if s.call else None, None, rounded(s)))
    places = sorted((p for p in places if p.value >= seen.thresholds.mean_over_std), key=lambda p: -p.value)
    if not places:
        return []
    worst = places[0]
    return [
        Finding(
            "numerics",
            "large mean",
            "warning",
            f"A mean is so large against its standard deviation that rounding takes {100 * worst.value:.2g}% of what "
            f"{worst.layer} normalizes.",
            worst.value,
            seen.thresholds.mean_over_std,
            "of a standard deviation",
            tuple(places),
            "Batch Renormalization, 3",
            "leave out the bias of the layer before it, center its input, or keep that layer in float32",
            "SOLVER.AMP.DTYPE bfloat16, SOLVER.AMP.ENABLED False",
        )
    ]


def rounded(s: SiteStatistics) -> float:
    """The share of a standard deviation that rounding takes, for the channel whose mean is largest against it."""
    rounding = max(float(torch.finfo(dtype).eps) for dtype in s.dtypes)
    ratio = s.own.mean.abs() / (s.own.var + s.norm.eps).sqrt()
    return float(ratio.max()) * rounding


def _dead(seen: Seen) -> list[Finding]:
    places = []
    for _, norm, sites in seen.layers():
        places.append(Place(norm.name, value=dead_channels(norm, sites)))
    places = sorted((p for p in places if p.value >= seen.thresholds.dead_channels), key=lambda p: -p.value)
    if not places:
        return []
    worst = places[0]
    return [
        Finding(
            "numerics",
            "dead channels",
            "warning",
            f"{100 * worst.value:.0f}% of the channels of {worst.layer} vary less than eps: they are divided by "
            "sqrt(eps) and not by their deviation, or carry nothing.",
            worst.value,
            seen.thresholds.dead_channels,
            "of the channels",
            tuple(places),
            "Batch Renormalization, 3",
            "a smaller eps, if the channels are alive; else look at the activation before them",
            "",
        )
    ]


def dead_channels(norm: Norm, sites: list[SiteStatistics]) -> float:
    """The share of a layer's channels that vary less than eps in all calls."""
    dead = torch.stack([s.own.var[0] < norm.eps for s in sites]).all(0)
    return float(dead.double().mean())
