"""Layers whose mode, parameters and statistics do not go together."""

from __future__ import annotations

from torch import nn

from ..finding import Finding, Place, counted
from ..norms import Norm
from ..seen import Seen
from .causes import in_average, initial_share, is_unfinished, never_updated
from .drift import KEYS, RECOMPUTE, drift_of

PAPER = 'Rethinking "Batch", 4.3, Fig. 6'


def check(seen: Seen) -> list[Finding]:
    """Never updated, unfinished averages, modes that contradict parameters, buffers that differ between ranks."""
    return [*_never_updated(seen), *_unfinished(seen), *_modes(seen), *_ranks(seen)]


def _never_updated(seen: Seen) -> list[Finding]:
    places = []
    for k, norm, sites in seen.layers():
        if never_updated(norm) and (norm.frozen or norm.follows_batches) and not in_average(seen, norm):
            value = drift_of(seen, k, norm, sites)
            if value >= seen.thresholds.drift:
                places.append(Place(norm.name, value=value))
    if not places:
        return []
    places.sort(key=lambda p: -p.value)
    worst = places[0]
    frozen = sum(_named(seen, p.layer).frozen for p in places)
    what = "inference normalizes nothing"
    if frozen:
        what = f"{frozen} of them are frozen: they normalize nothing, for ever"
    return [
        Finding(
            "frozen",
            "never updated",
            "error",
            f"The statistics of {counted(len(places), 'layer')} were never updated, mean 0 and variance 1, and "
            f"{what}: those of {worst.layer} are {worst.value:.2g} nats a channel from these batches.",
            worst.value,
            seen.thresholds.drift,
            "nats a channel",
            tuple(places),
            PAPER,
            f"load weights with statistics, or thaw the layers and {RECOMPUTE}" if frozen else RECOMPUTE,
            "MODEL.WEIGHTS, MODEL.BACKBONE.FREEZE_AT 0" if frozen else KEYS,
        )
    ]


def _unfinished(seen: Seen) -> list[Finding]:
    """Averages of so few steps that the initial statistics still count, where these do not fit."""
    places, drift = [], 0.0
    for k, norm, sites in seen.layers():
        left = initial_share(norm)
        if left is None or never_updated(norm) or in_average(seen, norm) or not is_unfinished(seen, norm):
            continue
        if (value := drift_of(seen, k, norm, sites)) >= seen.thresholds.drift / 2:
            places.append(Place(norm.name, value=left))
            drift = max(drift, value)
    if not places:
        return []
    places.sort(key=lambda p: -p.value)
    worst = places[0]
    norm = _named(seen, worst.layer)
    return [
        Finding(
            "frozen",
            "unfinished average",
            "error" if drift >= 5 * seen.thresholds.drift else "warning",
            f"The moving averages of {counted(len(places), 'layer')} have not converged, which makes up to "
            f"{drift:.2g} nats a channel: after {norm.tracked} steps with a momentum of {norm.momentum:g}, "
            f"{worst.layer} is still {100 * worst.value:.0f}% what it began with.",
            worst.value,
            seen.thresholds.unfinished,
            "of the statistics",
            tuple(places),
            'Rethinking "Batch", 3.1 and 3.2, Fig. 3',
            f"{RECOMPUTE}; or a momentum of {_momentum_for(norm.tracked or 1):.2g} or more",
            f"MODEL.NORM.MOMENTUM, {KEYS}",
        )
    ]


def _momentum_for(steps: int) -> float:
    """With which 1% of the initial statistics is left."""
    return 1 - 0.01 ** (1 / steps)


def _modes(seen: Seen) -> list[Finding]:
    learns = any(p.requires_grad for p in seen.model.parameters())
    moving, fixed, found = [], [], []
    for norm in seen.norms:
        own = list(norm.module.parameters(recurse=False))
        if not own or not learns or norm.fixed or _ours_is_frozen(norm):
            continue
        if norm.training and not any(p.requires_grad for p in own):
            moving.append(Place(norm.name, value=1.0))
        elif seen.model_training and not norm.training and any(p.requires_grad for p in own):
            fixed.append(Place(norm.name, value=1.0))
    if moving:
        found.append(
            Finding(
                "frozen",
                "parameters frozen, statistics not",
                "warning",
                f"The weight and bias of {counted(len(moving), 'layer')}, such as {moving[0].layer}, do not learn, "
                "but the layers are in training mode: they normalize by minibatches, and their running statistics "
                "move away.",
                float(len(moving)),
                1.0,
                "layers",
                tuple(moving),
                PAPER,
                "dn.freeze_batchnorm(model.backbone)",
                "MODEL.BACKBONE.NORM FrozenBN",
            )
        )
    if fixed:
        found.append(
            Finding(
                "frozen",
                "statistics frozen, parameters not",
                "note",
                f"In eval mode within a model that trains: {counted(len(fixed), 'layer')}, such as {fixed[0].layer}. "
                "The statistics are constants, while weight and bias learn. train() undoes that.",
                float(len(fixed)),
                1.0,
                "layers",
                tuple(fixed),
                PAPER,
                "dn.freeze_batchnorm(model.backbone), if it is meant: train() does not undo it",
                "MODEL.BACKBONE.NORM FrozenBN",
            )
        )
    return found


def _ours_is_frozen(norm: Norm) -> bool:
    return norm.ours and norm.frozen


def _ranks(seen: Seen) -> list[Finding]:
    """Running statistics that are not the same everywhere."""
    places = []
    for norm in seen.norms:
        known = [rank["statistics"][norm.name] for rank in seen.ranks if norm.name in rank["statistics"]]
        if len(known) > 1 and (value := max(abs(other - known[0]) for other in known)) > 0:
            places.append(Place(norm.name, value=value))
    if not places:
        return []
    places.sort(key=lambda p: -p.value)
    is_synchronized = any(isinstance(norm.module, nn.SyncBatchNorm) for norm in seen.norms)
    return [
        Finding(
            "frozen",
            "ranks differ",
            "warning",
            f"The running statistics of {counted(len(places), 'layer')} differ between the ranks, most of all those "
            f"of {places[0].layer}: which of them are saved, and evaluated, is a matter of chance.",
            places[0].value,
            0.0,
            "difference",
            tuple(places),
            'Rethinking "Batch", App. A.6',
            "dn.merge_population_statistics(model), before a checkpoint and an evaluation"
            + ("" if is_synchronized else "; or dn.convert_batchnorm(model, 'SyncBN')"),
            "MODEL.BACKBONE.NORM SyncBN",
        )
    ]


def _named(seen: Seen, name: str) -> Norm:
    return next(norm for norm in seen.norms if norm.name == name)
