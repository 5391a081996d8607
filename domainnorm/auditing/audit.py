"""The audit of a model: passes over batches, then checks."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import gather_objects
from ..errors import UserError, quote
from ..statistics.preserve import preserve_state
from .checks import CHECKS
from .checks.causes import initial_weight, rounded
from .checks.drift import drift_of
from .checks.numerics import dead_channels
from .confirm import confirm
from .divergence import mean_of
from .exact import exact_moments
from .finding import Finding, Thresholds, worst_first
from .leak import measure_leak
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
    leak: bool = False,
    exact: bool = False,
    score: Callable[[nn.Module], Any] | None = None,
    thresholds: Thresholds | Mapping[str, float] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    checks: Iterable[str] | None = None,
    progress: bool = True,
) -> Report:
    """Audit every layer of a model that normalizes by running statistics: what is wrong, how severe, and how to fix it.

    It works for any torch model and needs neither labels nor training. The model runs in eval mode, once under
    population statistics and once with each layer that follows its batches normalizing by the statistics of its own
    input, as in training. Ten checks then examine the inputs of each call of each layer, not of the layer alone.
    Afterwards the model, its modes and buffers, and the random state are exactly as before.

    Every rank calls it with its own batches. The layers of all ranks are compared, and each rank gets a report.

    Args:
        model: the whole model; it is unwrapped from `DistributedDataParallel` and `torch.compile`. It may be in
            training mode or not: layers in eval mode inside a model in training mode count as frozen.
        batches: whatever `model(batch)` takes, as in training: how many samples are normalized together is one of the
            things checked. 4 to 32 batches are enough. A mapping from names to such batches: one domain each.
        forward: `forward(model, batch)`, which returns predictions, for batches that the model does not take directly,
            such as pairs of inputs and targets. None: `model(batch)`.
        loss: `loss(model, batch)` of a model in training mode, for models that run differently in training: a number, a
            tensor, or a dict of losses. It costs one more pass, whose layer inputs the statistics are taken from.
        leak: whether to compare predictions, and the loss, in the given batches with those in batches that mix the
            samples of several (*Rethinking "Batch"*, §6): three more passes, six with a loss. Samples, and the RoIs of
            an image, are exchanged between up to 8 batches at each layer, so this takes the memory of 8 forward passes.
            It needs at least 4 batches; 16 or more show smaller leaks.
        exact: whether to compare running statistics with those of all batches as if they were one (App. A.3): one more
            pass, with the activations of all batches in memory.
        score: `score(model)`, higher is better, such as accuracy on a validation set. The remedies of the five worst
            findings that need no training are applied to the model one by one, then all together, and scored.
        thresholds: values from which on figures are findings, by name: `{"drift": 0.2}`. `docs/audit.md` lists them
            all.
        optimizer: used to find weight decay that reaches no parameter.
        accumulate: number of batches over which gradients are summed before a step.
        checks: names of the checks to run; None: all. `"calls"`, `"domains"`, `"drift"`, `"consistency"`, `"leak"`,
            `"batch_size"`, `"numerics"`, `"frozen"`, `"training"`, `"padding"`.
        progress: whether rank 0 shows a progress bar.

    Returns:
        A `Report`: printed, it is a table; `report.findings` has the worst first; `report.layers` has figures of each
        call.

    Raises:
        UserError: wrong arguments, no batch (or, for `leak`, only one), a score that is not a finite number, or `leak`
            or `exact` with a model that runs its layers in a different order for different batches.
        ValueError: a TorchScript model, or layers without a shape.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> batches = [5 * torch.randn(16, 3, 9, 9) for _ in range(4)]
        >>> report = dn.audit(model.eval(), batches, progress=False)  # was never trained
        >>> [(finding.check, finding.kind, finding.layers) for finding in report.findings if finding.level == "error"]
        [('frozen', 'never updated', ['1'])]
        >>> model = dn.recompute_population_statistics(model, batches, progress=False)
        >>> dn.audit(model, batches, progress=False).healthy
        True
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model takes an nn.Module, got {quote(model)}")
    for name, value in (("forward", forward), ("loss", loss), ("score", score)):
        if value is not None and not callable(value):
            raise UserError(f"{name} takes a function, got {quote(value)}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optimizer takes an optimizer of torch, got {quote(optimizer)}")
    if isinstance(model, DistributedDataParallel):
        model = model.module
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    chosen = _chosen(checks)
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise UserError(f"accumulate takes the number of batches in a step, 1 or more, got {accumulate!r}")
    norms = find_norms(model)
    seen = Seen(model, norms, Thresholds.of(thresholds), optimizer=optimizer, accumulate=accumulate)
    seen.model_training = model.training
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with preserve_state(model), torch.random.fork_rng(list(devices)), _other_generators():
        model.eval()
        passes = Passes(model, seen, forward or _call, loss, progress)
        with passes.observer.attached():
            sources = given_sources(batches)
            held = {name: list(own) for name, own in sources.items()} if leak or exact else {}
            seen.sources = list(sources)
            for name, own in (held or sources).items():
                passes.measure(own, name)
        if not seen.batches:
            raise UserError("there is no batch to audit the model with")
        seen.ranks = gather_objects(_of_rank(seen))
        if leak:
            seen.leak = measure_leak(passes, held)
        if exact:
            seen.exact = exact_moments(passes, held)
        found = {name: CHECKS[name](seen) for name in chosen}
        if "consistency" in chosen and (suspect := _suspect(seen, found)) is not None:
            with passes.observer.attached():
                passes.switch_alone(suspect)
            found["consistency"] = CHECKS["consistency"](seen)
        findings = worst_first(finding for own in found.values() for finding in own)
        scores = []
        if score is not None:
            with passes.observer.attached():
                scores = confirm(seen, passes.observer, findings, score)
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
        leak=seen.leak.figures() if seen.leak else None,
        scores=scores,
        model=type(model).__name__,
    )


@contextmanager
def _other_generators() -> Iterator[None]:
    """After the block the random numbers of Python and numpy are as before."""
    state, numpy = random.getstate(), sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


def _chosen(checks: Iterable[str] | None) -> list[str]:
    """The names of the checks to make."""
    if not isinstance(checks, (Iterable, type(None))):
        raise UserError(f"checks takes names of {list(CHECKS)}, got {checks!r}")
    names = [checks] if isinstance(checks, str) else list(CHECKS if checks is None else checks)
    for name in names:
        if name not in CHECKS:
            raise UserError(f"checks takes any of {list(CHECKS)}, got {name!r}")
    return names


def _call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def _suspect(seen: Seen, found: Mapping[str, list[Finding]]) -> int | None:
    """The layer that follows its batches and is named first by the worst finding."""
    for finding in worst_first(finding for own in found.values() for finding in own):
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
    """The figures of each site, as a report has them."""
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
