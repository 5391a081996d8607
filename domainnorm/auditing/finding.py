"""What an audit finds: one fault, how large it is, where, and what repairs it; and when a number is a fault."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError

LEVELS = ("error", "warning", "note")  # the worst first


@dataclass(frozen=True)
class Thresholds:
    """The value of each figure from which on it is a finding. `docs/audit.md` says how they were chosen.

    Attributes:
        calls: nats per channel between the statistics of one call of a layer and those of all its calls.
        domains: nats per channel between one domain and all together.
        separate: nats per channel up to which domains with separate statistics could share them.
        far_domain: nats per channel from the nearest domain.
        drift: nats per channel between running statistics and the batches, beyond what sampling explains.
        frozen_drift: the same, for running statistics that are constants.
        consistency: relative change of the model's output between minibatch and population statistics, beyond sampling.
        leak: relative change of the loss, or of the model's confidence, between given and mixed batches.
        batch_samples: smallest number of independent samples in a normalization batch.
        batch_elements: smallest number of elements of a channel in a normalization batch.
        mean_over_std: absolute mean / standard deviation of a channel, times the rounding error of its dtype.
        dead_channels: share of a layer's channels whose variance is below a hundredth of eps.
        unfinished: share that the initial statistics still have in the averages.
        padding: nats per channel between statistics with and without padding.
        mixed_batches: variance between batches, relative to what random batches seldom exceed.
    """

    calls: float = 0.1
    domains: float = 0.1
    separate: float = 0.01
    far_domain: float = 0.3
    drift: float = 0.1
    frozen_drift: float = 1.0
    consistency: float = 0.5
    leak: float = 0.1
    batch_samples: float = 4
    batch_elements: float = 8
    mean_over_std: float = 0.05
    dead_channels: float = 0.25
    unfinished: float = 0.1
    padding: float = 0.05
    mixed_batches: float = 1.5

    @classmethod
    def of(cls, values: Thresholds | Mapping[str, float] | None) -> Thresholds:
        """The defaults, with `values` in place of some.

        Raises:
            UserError: unknown names, or values that are not positive numbers.
        """
        if isinstance(values, Thresholds):
            return values
        known = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(values, (Mapping, type(None))):
            raise UserError(f"thresholds takes numbers by their names, such as {{'drift': 0.2}}, got {values!r}")
        for name, value in (values or {}).items():
            if name not in known:
                raise UserError(f"thresholds take any of {known}, got {name!r}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise UserError(f"thresholds: {name} takes a positive number, got {value!r}")
        return cls(**(values or {}))


@dataclass(frozen=True)
class Place:
    """Where a fault is.

    Attributes:
        layer: name of the layer, or of one of its parameters.
        call: number of the call within a forward pass; None: all.
        domain: number of the domain; None: all.
        value: the figure there.
        source: which of several sets of batches.
    """

    layer: str
    call: int | None = None
    domain: int | None = None
    value: float = float("nan")
    source: str = ""

    def __str__(self) -> str:
        said = [
            *([] if self.call is None else [f"call {self.call}"]),
            *([] if self.domain is None else [f"domain {self.domain}"]),
            *([self.source] if self.source else []),
        ]
        return ", ".join([self.layer, *said])


def norm_key(layer: str) -> str:
    """The config key of the norms among which a layer of this library's models is."""
    parts = {"roi_heads.box": "ROI_BOX_HEAD", "roi_heads.mask": "ROI_MASK_HEAD", "head.": "RETINANET"}
    for beginning, part in parts.items():
        if layer.startswith(beginning):
            return f"MODEL.{part}.NORM"
    return "MODEL.BACKBONE.NORM"


def counted(number: int, what: str) -> str:
    """`1 batch`, `2 batches`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}{'es' if what.endswith('ch') else 's'}"


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        check: which check found it: "calls", "domains", "drift", "consistency", "leak", "batch_size", "numerics",
            "frozen", "training", "padding".
        kind: which fault of that check, in one or two words.
        level: "error", "warning" or "note".
        message: what is wrong, in one or two sentences.
        value: the figure, at the worst place.
        threshold: the value from which on it is a finding.
        unit: of both.
        places: where, the worst first.
        paper: the section that explains it.
        remedy: a line of code that fixes it.
        config: config keys that do the same; "" if there are none.
        details: more figures.
    """

    check: str
    kind: str
    level: str
    message: str
    value: float
    threshold: float
    unit: str
    places: tuple[Place, ...]
    paper: str
    remedy: str
    config: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """Names of the affected layers, the worst first."""
        return list(dict.fromkeys(place.layer for place in self.places))

    @property
    def excess(self) -> float:
        """The ratio of the value to the threshold, or its inverse if lower is worse."""
        value, threshold = abs(self.value), self.threshold
        if not (value and threshold):
            return float("inf")
        return max(value / threshold, threshold / value)

    @property
    def order(self) -> tuple[int, bool, float]:
        """Sort key: by level; then NaN and broken statistics, on which other figures depend; then by excess."""
        is_broken = self.kind in ("broken statistics", "NaN")
        return LEVELS.index(self.level), not is_broken, -self.excess if self.excess == self.excess else 0.0


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """In order of their levels, and by how far they exceed their thresholds.

    What the output changes by is the effect of the others: it comes after the worst of them.
    """
    ordered = sorted(findings, key=lambda finding: finding.order)
    causes = [k for k, f in enumerate(ordered) if f.check != "consistency" and f.level != "note"]
    if causes and ordered[0].check == "consistency":
        ordered.insert(0, ordered.pop(causes[0]))
    return ordered
