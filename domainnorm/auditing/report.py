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
    """The result of `dn.audit`; printed, what is wrong in at most 40 lines.

    Attributes:
        findings: the worst first; empty for a healthy model.
        layers: figures of each call and domain of each layer, in the order of the forward pass: dicts with "layer",
            "kind", "call", "domain", "channels", "samples", "elements", "divergence" (own: under minibatch statistics
            before it), "expected" (of that, by sampling alone), "inference" (under population statistics), "alone",
            "propagated", "between_batches", "frozen", "padded", "rounded" (share of a standard deviation that rounding
            takes); and of the layer "drift" (beyond sampling, all calls together), "dead_channels" (share),
            "initial_weight" (of the statistics before the first step, in the average).
        output_change: relative change of the model's output between minibatch and population statistics, or nan.
        changed_alone: the same where one layer alone is switched, by its name: of the main suspect.
        leak: of `leak`: "loss_given" and "loss_mixed", or with "confidence", the means in given and mixed batches;
            "effect" (how much better the given ones are, as a share), "significant" (0 or 1), "change_given" and
            "change_mixed" (relative change of predictions from given to mixed batches, and between two mixes),
            "batches"; None: not asked for.
        scores: of `score`: rows with "what" and "score", the first as the model is.
        samples, batches, passes: what was given, and how often the model ran over it.
        norms: how many layers of the model normalize by running statistics.
        not_reached: layers that no batch came to.
        thresholds: from which on a figure is a finding.
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
        """Whether nothing but notes was found."""
        return all(finding.level == "note" for finding in self.findings)

    @property
    def counts(self) -> dict[str, int]:
        """How many findings there are of each level."""
        found = Counter(finding.level for finding in self.findings)
        return {level: found[level] for level in LEVELS}

    def __str__(self) -> str:
        return text_of(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {str(self).splitlines()[0]}>"

    def to_json(self) -> str:
        """All of it as JSON, with null for what is not finite.

        Returns:
            An object with the attributes, "healthy" and "counts".
        """
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content |= {"healthy": self.healthy, "counts": self.counts}
        return json.dumps(_plain(content), indent=1, allow_nan=False)

    def to_html(self) -> str:
        """All of it as one page of HTML that needs no other file and no network: findings, plots, a table of layers.

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
