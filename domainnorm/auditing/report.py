"""What an audit says: findings, the figures of each layer, as text, JSON and HTML."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from .finding import LEVELS, Finding, Thresholds
from .text import text_of


@dataclass(repr=False)
class Report:
    """The result of `dn.audit`; `print(report)` shows what is wrong in at most 40 lines.

    Attributes:
        findings: the worst first; empty for a healthy model.
        layers: figures of each call and domain of each layer, in the order of the forward pass: dicts with "layer",
            "kind", "call", "domain", "channels", "samples", "elements", "divergence" (own: with minibatch statistics in
            the layers before), "expected" (the part of it that sampling alone explains), "inference" (under population
            statistics), "alone", "propagated", "between_batches", "frozen", "padded", "rounded" (share of a standard
            deviation lost to rounding); and, for the layer as a whole, "drift" (beyond sampling, all calls together),
            "dead_channels" (share), "initial_weight" (of the initial statistics in the running average).
        output_change: relative change of the model's output between minibatch and population statistics, or nan.
        changed_alone: the same with only one layer switched, by its name: for the main suspect.
        leak: with `leak`: "loss_given" and "loss_mixed", or the same with "confidence": the means in given and mixed
            batches; "effect" (how much better the given ones are, as a share), "significant" (0 or 1), "change_given"
            and "change_mixed" (relative change of predictions from given to mixed batches, and between two mixes),
            "batches". None: not requested.
        scores: with `score`: rows with "what" and "score"; the first is for the unchanged model.
        samples, batches, passes: what was given, and how often the model ran over it.
        norms: number of layers that normalize by running statistics.
        not_reached: layers that no batch reached.
        thresholds: values from which on a figure is a finding.
        model: the name of its class.

    Example::

        >>> report = dn.audit(nn.Sequential(nn.BatchNorm2d(4)).eval(), [torch.randn(8, 4, 9, 9)], progress=False)
        >>> report.healthy
        True
        >>> print(report)
        healthy: no error and no warning in 1 norm of Sequential; 8 samples in 1 batch
    """

    findings: list[Finding]
    layers: list[dict[str, Any]]
    output_change: float
    changed_alone: dict[str, float]
    samples: int
    batches: int
    passes: int
    norms: int
    not_reached: list[str]
    thresholds: Thresholds
    leak: dict[str, float] | None = None
    scores: list[dict[str, Any]] = field(default_factory=list)
    model: str = "model"

    @property
    def healthy(self) -> bool:
        """Whether there are no errors and no warnings, only notes at most."""
        return all(finding.level == "note" for finding in self.findings)

    @property
    def counts(self) -> dict[str, int]:
        """The number of findings of each level."""
        found = Counter(finding.level for finding in self.findings)
        return {level: found[level] for level in LEVELS}

    def __str__(self) -> str:
        return text_of(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {str(self).splitlines()[0]}>"

    def to_json(self) -> str:
        """The whole report as JSON, with null for numbers that are not finite.

        Returns:
            An object with the attributes, "healthy" and "counts".
        """
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content |= {"healthy": self.healthy, "counts": self.counts}
        return json.dumps(_plain(content), indent=1, allow_nan=False)

    def to_html(self) -> str:
        """The whole report as a self-contained HTML page, which needs no network: findings, plots, a table of layers.

        Raises:
            UserError: matplotlib or torchvision is not installed.
        """
        check_page()
        from .page import page_of

        return str(page_of(self))


def check_page() -> None:
    """UserError if what a page is made with is not installed."""
    for name in ("matplotlib", "torchvision"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"the page of an audit needs {name}, which is not installed: pip install {name}")


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
