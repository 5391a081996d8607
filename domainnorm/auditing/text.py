"""A report for a terminal, in at most 40 lines."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import cut
from .finding import Finding

if TYPE_CHECKING:
    from .report import Report

LINES, WIDTH = 40, 100
_SITES, _SCORES, _PLACES, _NAMES = 5, 6, 4, 3  # of each how many are shown
FIGURES = {"inference": "inference", "own": "divergence", "alone": "alone", "propagated": "propagated"}


def text_of(report: Report) -> str:
    """The verdict; findings, the worst first, as many as there is space for; the worst layers; what was measured."""
    if report.healthy:
        return "\n".join([verdict(report), *_findings(report.findings, LINES - 1)])
    end = [*_scores(report.scores), *_worst(report), *_measured(report)]
    return "\n".join([verdict(report), "", *_findings(report.findings, LINES - 2 - len(end)), *end])


def verdict(report: Report) -> str:
    """One line: how many findings there are, or that the model is healthy."""
    norms = f"{counted(report.norms, 'norm')} of {report.model}"
    if not report.healthy:
        return f"{', '.join(counted(n, level) for level, n in report.counts.items())} in {norms}"
    if not report.norms:
        return f"nothing to audit: no layer of {report.model} normalizes by running statistics"
    reached = f"; {len(report.not_reached)} of them not reached" if report.not_reached else ""
    return f"healthy: no error and no warning in {norms}; {_given(report)}{reached}"


def counted(number: int, what: str) -> str:
    """`1 batch`, `2 batches`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}{'es' if what.endswith('ch') else 's'}"


def figure(value: float | None) -> str:
    """Three digits of a number, or a dash."""
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"


def last_part(name: str, most: int) -> str:
    """`name`, or the end of it, where layers differ."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def site_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The layer of each row of a report's, with call and domain where it has several."""
    several = {}
    for key in ("call", "domain"):
        pairs = {(row["layer"], row[key]) for row in rows}
        several[key] = {layer for layer, number in pairs if number}
    return [
        ", ".join([row["layer"], *(f"{key} {row[key]}" for key in several if row["layer"] in several[key])])
        for row in rows
    ]


def places(finding: Finding, most: int = _PLACES) -> str:
    """The worst of its places, with their figures."""
    shown = [f"{place}: {figure(place.value)}" for place in finding.places[:most]]
    more = len(finding.places) - len(shown)
    return "; ".join([*shown, *([f"and {more} more"] if more > 0 else [])])


def _findings(findings: Sequence[Finding], room: int) -> list[str]:
    """The first in full, and each other one while there is space for a line of each of those after it."""
    lines: list[str] = []
    for k, finding in enumerate(findings):
        left = len(findings) - k - 1
        whole = _whole(finding)
        if k and len(lines) + len(whole) + left > room:
            short = [cut(f"{one.level}: {one.message}", WIDTH) for one in findings[k:]]
            space = room - len(lines)
            if len(short) > space:
                short = [*short[: space - 1], f"and {len(short) - space + 1} more findings"]
            return lines + short
        lines += whole
    return lines


def _whole(finding: Finding) -> list[str]:
    lines = _wrapped(f"{finding.level}: {finding.message}", "", "  ", 5)
    said = {
        "where": f"{finding.unit} (threshold {figure(finding.threshold)}): {places(finding)}",
        "repair": finding.remedy,
        "config": finding.config,
        "paper": finding.paper,
    }
    for key, value in said.items():
        lines += _wrapped(value, f"  {key + ':':8}", " " * 10, 3)
    return lines


def _wrapped(text: str, first: str, other: str, most: int) -> list[str]:
    """Lines of a text, what the first and the others begin with; none of an empty text."""
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=other, max_lines=most, placeholder=" …", **options
    )


def _worst(report: Report) -> list[str]:
    """A table of the calls whose inputs are farthest from their running statistics."""

    def far(item: tuple[str, Mapping[str, Any]]) -> float:
        values = [item[1][key] for key in ("inference", "divergence")]
        return max((v for v in values if v is not None and not math.isnan(v)), default=0.0)

    rows = sorted(zip(site_names(report.layers), report.layers, strict=True), key=far, reverse=True)[:_SITES]
    if not rows:
        return []
    cells = [[last_part(name, 60), *(figure(row[key]) for key in FIGURES.values())] for name, row in rows]
    return ["", *_columns([["farthest from statistics", *FIGURES], *cells])]


def _scores(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [[cut(row["what"], WIDTH - 12), figure(row["score"])] for row in scores[:_SCORES]]
    return ["", *_columns([["remedy", "score"], *cells])] if cells else []


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first of words, the others of numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _given(report: Report) -> str:
    return f"{counted(report.samples, 'sample')} in {counted(report.batches, 'batch')}"


def _measured(report: Report) -> list[str]:
    sites = f"{len(report.layers)} calls and domains" if len(report.layers) != report.norms else "each called once"
    said = [f"{_given(report)}, {report.passes} passes; {counted(report.norms, 'norm')}, {sites}"]
    if not math.isnan(report.output_change):
        said.append(f"the output changes by {100 * report.output_change:.0f}% from population to minibatch statistics")
    if report.leak:
        said.append(", ".join(f"{name} {figure(value)}" for name, value in report.leak.items()))
    if report.not_reached:
        names = [*report.not_reached[:_NAMES], *(["…"] if len(report.not_reached) > _NAMES else [])]
        said.append(f"not reached: {len(report.not_reached)} ({', '.join(names)})")
    return ["", *_wrapped(f"measured: {'; '.join(said)}", "", "  ", 4)]
