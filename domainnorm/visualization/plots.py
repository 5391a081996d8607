"""Figures of matplotlib: training, precision by recall, F1 by score, confusion matrices. Needs matplotlib."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm, to_hex
from matplotlib.figure import Figure

from ..errors import cut
from .draw import PALETTE

MAX_NAMED = 10  # lines with a name each; more are grey, and only what is over all of them is named
MAX_CELLS = 15  # rows of a confusion matrix with numbers in it
_RECALLS = np.linspace(0, 1, 101)
_DPI = 110

Series = Mapping[str, tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]]  # of each name x and y


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()


def lines(panels: Mapping[str, Series], x_label: str) -> Figure:
    """One panel above the other, with a line for each series; a series without points is left out."""
    figure = Figure(figsize=(7, 2.6 * len(panels) + 0.5), layout="constrained")
    for axes, (title, series) in zip(_axes(figure, len(panels)), panels.items(), strict=True):
        for k, (name, (x, y)) in enumerate(series.items()):
            if len(x):
                axes.plot(x, y, color=_color(k), label=cut(name, 40), marker="o" if len(x) < 30 else "", markersize=3)
        axes.set_title(title, loc="left", fontsize=10)
        if any(len(x) for x, _ in series.values()):
            axes.legend(fontsize=8, frameon=False)
    axes.set_xlabel(x_label)
    return figure


def precision_by_recall(curves: Mapping[str, np.ndarray]) -> Figure:
    """The highest precision at 101 recalls or beyond, for each class, and the mean. The area under it is AP50.

    Args:
        curves: of each class (101,).
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    (axes,) = _axes(figure, 1)
    mean = np.mean(list(curves.values()), axis=0)
    for k, (name, precision) in enumerate(curves.items()):
        if len(curves) <= MAX_NAMED:
            axes.plot(_RECALLS, precision, color=_color(k), label=f"{cut(name, 30)}: AP50 {100 * precision.mean():.1f}")
        else:
            axes.plot(_RECALLS, precision, color="#bbbbbb", linewidth=0.7)
    if len(curves) > 1:
        axes.plot(_RECALLS, mean, "k", linewidth=2.5, label=f"mean of {len(curves)}: AP50 {100 * mean.mean():.1f}")
    axes.set(xlabel="recall at an IoU of 0.5", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
    axes.legend(fontsize=8, loc="lower left")
    return figure


def f1_by_score(curves: Series, best: tuple[float, float] | None) -> Figure:
    """F1 against the score from which on predictions are kept.

    Args:
        curves: scores from the highest on, and F1, of each class and, as the last, over all of them.
        best: score and F1 of the highest point over all classes.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    (axes,) = _axes(figure, 1)
    *classes, overall = curves.items()
    for k, (name, (scores, f1)) in enumerate(classes):
        named = len(classes) <= MAX_NAMED
        look: dict[str, Any] = {"color": _color(k), "label": cut(name, 30)} if named else {"color": "#bbbbbb"}
        axes.step(scores, f1, where="pre", linewidth=1.2 if named else 0.7, **look)
    name, (scores, f1) = overall
    axes.step(scores, f1, "k", where="pre", linewidth=2.5, label=name)
    if best:
        axes.plot(*best, "ko", label=f"F1 {best[1]:.3f} from a score of {best[0]:.3f} on")
    axes.set(xlabel="lowest score that is kept", ylabel="F1 at an IoU of 0.5", xlim=(0, 1.01), ylim=(0, 1.02))
    axes.legend(fontsize=8, loc="upper right")
    return figure


def confusion_matrix(confusion: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Figure:
    """How many of each row were taken for each column; the color is the share of the row.

    Args:
        confusion: (len(rows), len(columns)).
    """
    number = len(rows)
    side = min(max(4.5, 0.55 * number), 0.11 * number + 4.5, 40)  # inches
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    (axes,) = _axes(figure, 1)
    axes.grid(False)
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.6, 0, 1))  # what is rare is seen, too
    size = 9 if number <= MAX_CELLS else min(6, 50 * side / number)  # points
    axes.set_xticks(range(len(columns)), [cut(name, 20) for name in columns], rotation=90, fontsize=size)
    axes.set_yticks(range(number), [cut(name, 20) for name in rows], fontsize=size)
    axes.set(xlabel="predicted", ylabel="true")
    if number <= MAX_CELLS:
        for (row, column), count in np.ndenumerate(confusion):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=9)
    figure.colorbar(image, label="share of the row", shrink=0.5)
    return figure


def along_depth(
    names: Sequence[str], panels: Mapping[str, Mapping[str, Sequence[float]]], limits: Mapping[str, float]
) -> Figure:
    """One panel above the other, with a line for each series over the layers of a model; as wide as names need.

    The scale is linear up to a hundredth of the limit, or of 1, and logarithmic beyond.

    Args:
        names: of the layers, from the first to be reached on.
        panels: of each title the series, with a number of each layer; nan where there is none.
        limits: of some titles the height of a dashed line.
    """
    width = min(max(7.0, 1.2 + 0.17 * len(names)), 60.0)  # inches
    step = math.ceil(0.17 * len(names) / width)
    longest = max(map(len, names), default=0)
    figure = Figure(figsize=(width, 2.2 * len(panels) + 0.065 * longest + 0.3), layout="constrained")
    axes = _axes(figure, len(panels))
    for one, (title, series) in zip(axes, panels.items(), strict=True):
        limit = limits.get(title)
        for k, (name, values) in enumerate(series.items()):
            look: dict[str, Any] = {"color": _color(k), "linestyle": ("-", "--", ":")[k % 3], "linewidth": 1.2}
            one.plot(range(len(names)), values, label=name, marker="o", markersize=3, **look)
        if limit:
            one.axhline(limit, color="#cc2222", linestyle="--", linewidth=0.8, label=f"threshold {limit:g}")
        one.set_yscale("symlog", linthresh=(limit or 1) / 100)
        highest = np.nanmax([limit or 0.01, *(value for values in series.values() for value in values)])
        one.set_ylim(0, 10 * highest)  # with space for the legend
        one.set_title(title, loc="left", fontsize=10)
        one.legend(fontsize=8, frameon=False, loc="upper left", ncols=4)
        one.tick_params(labelbottom=one is axes[-1])
    axes[-1].set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=8)
    axes[-1].set_xlim(-0.7, len(names) - 0.3)
    return figure


def _axes(figure: Figure, number: int) -> list[Axes]:
    axes = figure.subplots(number, 1, squeeze=False, sharex=True)[:, 0].tolist()
    for one in axes:
        one.grid(True, color="#dddddd", linewidth=0.6)
        one.set_axisbelow(True)
        one.tick_params(labelbottom=True)
        one.spines[["top", "right"]].set_visible(False)
    return axes


def _color(k: int) -> str:
    return to_hex(PALETTE[k % len(PALETTE)])
