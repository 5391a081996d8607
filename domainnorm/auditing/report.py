"""What an audit says: findings, the figures of each layer, as text, JSON and HTML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .finding import Finding, Thresholds


@dataclass
class Report:
    """The result of `dn.audit`.

    Attributes:
        findings: the worst first; empty for a healthy model.
        layers: figures of each call and domain of each layer, in the order of the forward pass: dicts with "layer",
            "kind", "call", "domain", "samples", "elements", "divergence" (own: under minibatch statistics before it),
            "inference" (under population statistics), "alone", "propagated", "calls", "between_batches",
            "frozen", "padded".
        output_change: relative change of the model's output between minibatch and population statistics, or nan.
        changed_alone: the same where one layer alone is switched, by its name: of the main suspect.
        scores: of `score`: rows with "what" and "score", the first as the model is.
        samples, batches, passes: what was given, and how often the model ran over it.
        not_reached: layers that no batch came to.
        thresholds: from which on a figure is a finding.
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

    @property
    def healthy(self) -> bool:
        """Whether nothing but notes was found."""
        return all(finding.level == "note" for finding in self.findings)
