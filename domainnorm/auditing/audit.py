"""The audit of a model: passes over batches, then checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import gather_objects
from ..errors import UserError
from ..statistics.preserve import preserve_state
from .checks import CHECKS
from .checks.drift import drift_of
from .checks.frozen import initial_weight
from .checks.numerics import dead_channels, rounded
from .divergence import mean_of
from .finding import Finding, Thresholds
from .norms import find_norms
from .report import Report
from .run import Passes, given_sources
from .seen import Seen


@torch.no_grad()
def audit(
    model: nn.Module,
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    thresholds: Thresholds | Mapping[str, float] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    checks: Iterable[str] | None = None,
    progress: bool = True,
) -> Report:
    """Examine every layer of a model that normalizes by running statistics: what is wrong, how bad, what repairs it.

    Any model of torch will do, without labels. It runs in eval mode, under population and under minibatch statistics,
    and is left as it was, to the bit.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    chosen = list(CHECKS if checks is None else checks)
    norms = find_norms(model)
    seen = Seen(model, norms, Thresholds.of(thresholds), optimizer=optimizer, accumulate=accumulate)
    seen.model_training = model.training
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with preserve_state(model), torch.random.fork_rng(list(devices)):
        model.eval()
        passes = Passes(model, seen, forward or _call, loss, progress)
        with passes.observer.attached():
            sources = given_sources(batches)
            seen.sources = list(sources)
            for name, own in sources.items():
                passes.measure(own, name)
            if not seen.batches:
                raise UserError("there is no batch to audit the model with")
            seen.ranks = gather_objects(_of_rank(seen))
            found = {name: CHECKS[name](seen) for name in chosen}
            if "consistency" in chosen and (suspect := _suspect(seen, found)) is not None:
                passes.switch_alone(suspect)
                found["consistency"] = CHECKS["consistency"](seen)
    findings = sorted((finding for own in found.values() for finding in own), key=lambda finding: finding.order)
    return Report(
        findings=findings,
        layers=_figures(seen),
        output_change=seen.output.value,
        changed_alone={norms[k].name: value for k, value in seen.alone.items()},
        samples=seen.samples,
        batches=seen.batches,
        passes=seen.passes,
        norms=len(norms),
        not_reached=seen.not_reached,
        thresholds=seen.thresholds,
        model=type(model).__name__,
    )


def _call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def _suspect(seen: Seen, found: Mapping[str, list[Finding]]) -> int | None:
    """The layer that follows its batches and is named first by the worst finding."""
    for finding in sorted((finding for own in found.values() for finding in own), key=lambda finding: finding.order):
        for name in finding.layers:
            for k, norm in enumerate(seen.norms):
                if norm.name == name and norm.follows_batches:
                    return k
    return None


def _of_rank(seen: Seen) -> dict[str, Any]:
    """What this rank tells the others."""
    samples: dict[str, float] = {}
    for _, norm, sites in seen.layers():
        samples[norm.name] = min(min(z.independent for z in s.sizes) for s in sites)
    statistics = {norm.name: float(norm.mean.sum() + norm.var.sum()) for norm in seen.norms}
    return {"samples": samples, "statistics": statistics}


def _figures(seen: Seen) -> list[dict[str, Any]]:
    """Of each site, as a report has them."""
    rows = []
    for k, norm, sites in seen.layers():
        ranks = seen.ranks_of(norm)
        of_layer = {
            "drift": drift_of(seen, k, norm, sites),
            "dead_channels": dead_channels(norm, sites),
            "initial_weight": initial_weight(norm) if norm.follows_batches else None,
        }
        for s in sites:
            site = (k, s.call, s.domain)
            inference, propagated = seen.inference.get(site), seen.propagated.get(site)
            follows = norm.follows_batches
            rows.append(
                {
                    "layer": norm.name,
                    "kind": norm.kind,
                    "call": s.call,
                    "domain": s.domain,
                    "channels": norm.mean.shape[1],
                    "samples": ranks * min((z.independent for z in s.sizes if z.elements), default=0),
                    "elements": ranks * min((z.elements for z in s.sizes if z.elements), default=0),
                    "divergence": mean_of(s.drift()),
                    "expected": mean_of(s.expected()),
                    "inference": mean_of(inference.drift()) if inference and inference.total is not None else None,
                    "alone": mean_of(s.alone()) ** 0.5 if follows else 0.0,
                    "propagated": propagated.value**0.5 if propagated else None,
                    "between_batches": s.between_batches(),
                    "frozen": norm.frozen,
                    "padded": sum(s.padded) / len(s.sizes) if s.padded else 0.0,
                    "rounded": rounded(s),
                    **of_layer,
                }
            )
    return rows
