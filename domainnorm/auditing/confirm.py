"""Remedies that need no training, applied one by one, and what a score says of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed import gather_objects
from ..errors import UserError
from ..layers import DomainBatchNorm
from ..ops.moments import Moments
from ..statistics.preserve import preserve_state
from .finding import Finding
from .norms import Norm
from .observe import Observer
from .seen import Seen

MOST = 5  # remedies
Score = Callable[[nn.Module], Any]

_RECOMPUTED = {
    ("drift", "statistics lag"),
    ("drift", "frozen statistics do not fit"),
    ("frozen", "never updated"),
    ("frozen", "unfinished average"),
    ("training", "averaged weights"),
    ("numerics", "half-precision statistics"),
    ("numerics", "broken statistics"),
}


class Remedy(NamedTuple):
    """What is done, and the running statistics of each call `(K, C)`, by the number of the layer; or minibatches."""

    what: str
    calls: dict[int, list[Moments]]
    minibatch: tuple[int, ...] = ()


@torch.no_grad()
def confirm(seen: Seen, observer: Observer, findings: Sequence[Finding], score: Score) -> list[dict[str, Any]]:
    """The score of the model as it is, with each remedy, and with all, as rows of "what" and "score".

    Args:
        findings: the worst first.
        observer: attached to the model, which is in eval mode, within `preserve_state`.

    Raises:
        UserError: a score that is not a finite number.
    """
    remedies = [remedy for finding in findings if (remedy := _remedy(seen, finding)) is not None][:MOST]
    if not remedies:
        suspects = [finding for finding in findings if finding.check in ("leak", "consistency")]
        remedies = [remedy for finding in suspects if (remedy := _by_minibatch(seen, finding)) is not None][:1]
    remedies = gather_objects(remedies)[0]  # the same on all ranks, whose scores may have collectives
    rows = [Remedy("as it is", {}), *remedies]
    if len(remedies) > 1:
        together: dict[int, list[Moments]] = {}
        for remedy in reversed(remedies):  # of two for one layer, that of the worse finding
            several = {k for k, calls in together.items() if len(calls) > 1}
            together |= {k: calls for k, calls in remedy.calls.items() if len(calls) > 1 or k not in several}
        rows.append(Remedy("all together", together))
    return [{"what": row.what, "score": _scored(seen.model, observer, row, score)} for row in rows]


def _scored(model: nn.Module, observer: Observer, remedy: Remedy, score: Score) -> float:
    devices = list(range(torch.cuda.device_count()))
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(preserve_state(model))
        stack.enter_context(_applied(model, observer, remedy))
        value = score(model)
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        got = f"{number!r}" if isinstance(number, (int, float)) else type(value).__name__
        raise UserError(f"score(model), {remedy.what}: expected a finite number, higher is better, got {got}")
    return float(number)


@contextmanager
def _applied(model: nn.Module, observer: Observer, remedy: Remedy) -> Iterator[None]:
    numbers = {id(norm): k for k, norm in enumerate(observer.norms)}

    def choice(norm: Norm, number: int) -> Moments | None:
        calls = remedy.calls.get(numbers[id(norm)])
        return None if calls is None else calls[number % len(calls)]  # images one by one: the same again

    for k, calls in remedy.calls.items():
        module = observer.norms[k].module
        if isinstance(module, DomainBatchNorm) and calls[0].mean.shape[0] > 1:
            _per_domain(module)
    statistics = observer.by_minibatch(remedy.minibatch) if remedy.minibatch else observer.by(choice)
    with model.register_forward_pre_hook(lambda module, args: observer.begin()), statistics:
        yield


def _per_domain(layer: DomainBatchNorm) -> None:
    """Population statistics for each domain; `preserve_state` has those that all shared."""
    layer.population_statistics = "per_domain"
    for name, buffer in list(layer.named_buffers(recurse=False)):
        setattr(layer, name, buffer.expand(layer.num_domains, *buffer.shape).clone())


def _remedy(seen: Seen, finding: Finding) -> Remedy | None:
    """What repairs a finding without training; None: there is no such thing."""
    numbers = [k for k, norm in enumerate(seen.norms) if norm.name in finding.layers]
    if (finding.check, finding.kind) == ("calls", "shared statistics"):
        return Remedy(f"calls: own statistics for each call of {_names(finding)}", _of_calls(seen, numbers))
    if (finding.check, finding.kind) in _RECOMPUTED:
        made = {k: [moments] for k in numbers if (moments := _recomputed(seen, k)) is not None}
        return Remedy(f"{finding.check}: statistics of {_names(finding)} recomputed", made) if made else None
    return None


def _by_minibatch(seen: Seen, finding: Finding) -> Remedy | None:
    numbers = [k for k, norm in enumerate(seen.norms) if norm.name in finding.layers[:1]]
    what = f"{finding.check}: {finding.layers[0]} by minibatch statistics" if finding.layers else ""
    return Remedy(what, {}, tuple(numbers)) if numbers else None


def _names(finding: Finding) -> str:
    names = finding.layers
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _of_calls(seen: Seen, numbers: Sequence[int]) -> dict[int, list[Moments]]:
    """The statistics of each call of some layers, or of each domain of a call."""
    made = {}
    for k in numbers:
        sites = seen.sites(k)
        if len({s.call for s in sites}) > 1:
            own = {s.call: s.own for s in sites}
            made[k] = [own.get(call, sites[0].own) for call in range(max(own) + 1)]
        else:
            own = {s.domain: s.own for s in sites}
            domains = seen.norms[k].module.num_domains
            made[k] = [Moments.cat([own.get(domain, sites[0].own) for domain in range(domains)])]  # type: ignore[arg-type]
    return made


def _recomputed(seen: Seen, k: int) -> Moments | None:
    """The statistics `(K, C)` of the batches, each call counting alike; of a domain without elements, what it had."""
    norm, sites = seen.norms[k], seen.sites(k)
    if not sites:
        return None
    rows = []
    for row in range(norm.mean.shape[0]):
        own = [s.own for s in sites if norm.row(s.domain) == row]
        one = torch.ones_like(norm.mean[:1, :1])
        parts = [Moments(one.to(m.mean.device), m.mean, m.var) for m in own]
        had = Moments(one, norm.mean[row : row + 1], norm.var[row : row + 1])
        rows.append(Moments.cat(parts).merge(0) if parts else had)
    return Moments.cat(rows)
