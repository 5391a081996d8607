"""A report as a page of HTML: findings, plots along depth, a table of all layers. Needs matplotlib and torchvision."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..visualization import plots
from ..visualization.page import Page
from .text import counted, figure, last_part, places, site_names, verdict

if TYPE_CHECKING:
    from .report import Report

_NAME = 48  # characters of a name below a plot
COLUMNS = {  # of the table of layers: a figure, and what it is
    "inference": ("inference", "divergence from the running statistics in inference, nats a channel"),
    "own": ("divergence", "the same where all layers before it normalize by minibatches: the layer's own"),
    "by chance": ("expected", "what sampling explains of that"),
    "drift": ("drift", "beyond that, the calls of a layer together"),
    "alone": ("alone", "relative change of normalized values between minibatch and population statistics"),
    "propagated": ("propagated", "the same with all layers before it switched, too"),
    "samples": ("samples", "independent ones in the smallest normalization batch"),
    "elements": ("elements", "of a channel in the smallest normalization batch"),
    "between": ("between_batches", "variance between batches over that of random ones"),
    "padded": ("padded", "share of padding"),
    "rounded": ("rounded", "share of a standard deviation that rounding takes"),
    "dead": ("dead_channels", "share of channels that vary less than eps"),
    "initial": ("initial_weight", "weight of the statistics before the first step in the moving average"),
    "channels": ("channels", "of the layer"),
}
DIVERGENCE = "Divergence from the running statistics, nats a channel"
DRIFT = "Drift beyond sampling, nats a channel"
CHANGE = "Change of normalized values from population to minibatch statistics"
BETWEEN = "Variance between batches, times that of random ones"
PANELS = {  # of the plots: columns of the table
    DIVERGENCE: ("inference", "own", "by chance"),
    DRIFT: ("drift",),
    CHANGE: ("alone", "propagated"),
    BETWEEN: ("between",),
}


def page_of(report: Report) -> Page:
    """Findings first; then plots, the table of layers, and what was measured."""
    page = Page(f"Audit of {report.model}")
    page.text(verdict(report))
    _findings(page, report)
    _scores(page, report)
    _leak(page, report)
    if report.layers:
        page.heading("Along depth")
        page.picture(plots.png(_plots(report)), "From the first call of a forward pass to the last", wide=True)
        _layers(page, report)
    _measured(page, report)
    return page


def _findings(page: Page, report: Report) -> None:
    page.heading("Findings")
    if not report.findings:
        page.items(["Nothing."])
    for finding in report.findings:
        page.heading(f"{finding.level.capitalize()}: {finding.kind}", 3, mark=finding.level)
        page.items(
            [
                finding.message,
                f"Figure: {figure(finding.value)} {finding.unit}; threshold {figure(finding.threshold)}",
                f"Where: {places(finding, 8)}",
                f"Paper: {finding.paper}",
            ]
        )
        page.code(f"repair:  {finding.remedy}" + (f"\nconfig:  {finding.config}" if finding.config else ""))


def _scores(page: Page, report: Report) -> None:
    if report.scores:
        page.heading("Scores")
        page.table(["the model", "score"], [[row["what"], figure(row["score"])] for row in report.scores])


def _leak(page: Page, report: Report) -> None:
    if report.leak:
        page.heading("Batches as they are, and mixed")
        page.table(["figure", "value"], [[name, figure(value)] for name, value in report.leak.items()])


def _plots(report: Report) -> plots.Figure:
    panels = {
        title: {
            column: [float("nan") if (value := row[COLUMNS[column][0]]) is None else value for row in report.layers]
            for column in columns
        }
        for title, columns in PANELS.items()
        if title != BETWEEN or report.leak is not None
    }
    names = [last_part(name, _NAME) for name in site_names(report.layers)]
    limits = {DIVERGENCE: report.thresholds.drift, DRIFT: report.thresholds.drift}
    return plots.along_depth(names, panels, limits | {BETWEEN: report.thresholds.mixed_batches})


def _layers(page: Page, report: Report) -> None:
    page.heading("Layers")
    page.text("A click on the head of a column sorts by it; # is the order of the forward pass.")
    rows = [
        [name, row["kind"] + " (frozen)" * row["frozen"], str(k), *(figure(row[key]) for key, _ in COLUMNS.values())]
        for k, (name, row) in enumerate(zip(site_names(report.layers), report.layers, strict=True))
    ]
    page.table(["layer", "kind", "#", *COLUMNS], rows, words=2, sortable=True)
    page.items([f"{head}: {said}" for head, (_, said) in COLUMNS.items()])


def _measured(page: Page, report: Report) -> None:
    page.heading("What was measured")
    page.items(
        [
            f"{counted(report.samples, 'sample')} in {counted(report.batches, 'batch')}, {report.passes} passes",
            f"{counted(report.norms, 'norm')}, {len(report.layers)} calls and domains",
            f"Change of the output from population to minibatch statistics: {figure(report.output_change)}",
            *(f"… where {name} alone is switched: {figure(value)}" for name, value in report.changed_alone.items()),
            *([f"Not reached: {', '.join(report.not_reached)}"] if report.not_reached else []),
        ]
    )
    page.heading("Thresholds", 3)
    page.table(
        ["threshold", "value"], [[name, f"{value:g}"] for name, value in dataclasses.asdict(report.thresholds).items()]
    )
