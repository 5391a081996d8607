"""The objects of the training sets as plots: classes, places, sizes, and how well anchors fit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..data.statistics import SetStatistics
from ..output import replace_file

MAX_BARS = 40
_BLUE, _RED = "#4363d8", "#e6194b"


def draw_labels(
    file: Path, training: Sequence[SetStatistics], best_ious: Tensor | None = None, anchors: Tensor | None = None
) -> None:
    """One picture of all training sets together; nothing if they are not of this library.

    Args:
        best_ious: of all objects with an anchor.
        anchors: their widths and heights, (a, 2).
    """
    names = next((own.class_names for own in training if own.class_names), None)
    if names is None:
        return
    boxes = np.concatenate([own.boxes for own in training])
    plots = 6 if len(boxes) else 1
    figure = Figure((13, 7.5) if plots == 6 else (9, 5))
    # Not matplotlib's own layouts, which draw everything twice.
    figure.subplots_adjust(0.055, 0.075 if plots == 6 else 0.2, 0.985, 0.945, wspace=0.2, hspace=0.42)
    axes = figure.subplots(2, 3).flat if plots == 6 else [figure.subplots()]
    counts = sum(own.class_counts for own in training if len(own.class_counts) == len(names))
    _bars(axes[0], names, np.asarray(counts), "objects" if plots == 6 else "images")
    if plots == 6:
        sizes = np.concatenate([own.sizes for own in training])
        _objects(axes[1], np.concatenate([own.objects for own in training]))
        _centers(axes[2], boxes, sizes)
        _sides(axes[3], boxes, anchors)
        _areas(axes[4], boxes, anchors)
        _ious(axes[5], best_ious)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure)
    with replace_file(file, "wb") as stream:
        figure.savefig(stream, format="png", dpi=100)


def _bars(axis: Any, names: Sequence[str], counts: np.ndarray, what: str) -> None:
    order = np.argsort(-counts, kind="stable")[:MAX_BARS]
    axis.bar(range(len(order)), counts[order], color=_BLUE)
    shown = [name if len(name) <= 14 else f"{name[:13]}…" for name in (names[label] for label in order)]
    upright = len(order) > 6 or max(map(len, shown)) > 10
    axis.set_xticks(range(len(order)), shown, rotation=90 if upright else 0, fontsize=7 if upright else 10)
    more = f", {MAX_BARS} most frequent of {len(names)}" if len(names) > MAX_BARS else ""
    axis.set_title(f"{what} of each class{more}")
    if len(order) <= 12:
        for place, label in enumerate(order):
            axis.annotate(str(counts[label]), (place, counts[label]), ha="center", va="bottom", fontsize=8)


def _objects(axis: Any, objects: np.ndarray) -> None:
    most = int(objects.max(initial=1))
    axis.hist(objects, bins=np.linspace(-0.5, most + 0.5, min(most + 2, 60)), color=_BLUE)
    axis.set_title("objects of an image")
    axis.set_ylabel("images")


def _centers(axis: Any, boxes: np.ndarray, sizes: np.ndarray) -> None:
    x, y = ((boxes[:, k] + boxes[:, k + 2]) / 2 / sizes[:, 1 - k] for k in (0, 1))
    axis.hist2d(x, y, bins=40, range=((0, 1), (0, 1)), cmap="viridis")
    axis.set(xlim=(0, 1), ylim=(1, 0), title="centers of boxes", xlabel="x / width", ylabel="y / height")


def _sides(axis: Any, boxes: np.ndarray, anchors: Tensor | None) -> None:
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.5)
    axis.hexbin(*sides.T, xscale="log", yscale="log", gridsize=35, mincnt=1, bins="log", cmap="Blues")
    if anchors is not None:
        axis.plot(*anchors.numpy().T, "+", color=_RED, markersize=5, label="anchors")
        axis.legend(loc="upper left", frameon=False)
    axis.set(title="sides of boxes, as trained", xlabel="width in pixels", ylabel="height in pixels")


def _areas(axis: Any, boxes: np.ndarray, anchors: Tensor | None) -> None:
    roots = np.sqrt(np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(1), 0.25))
    axis.hist(roots, bins=np.geomspace(roots.min() * 0.99, roots.max() * 1.01, 50), color=_BLUE)
    axis.set_xscale("log")
    if anchors is not None:
        for root in sorted({round(float(root), 1) for root in anchors.prod(1).sqrt()}):
            axis.axvline(root, color=_RED, linewidth=0.6)
    axis.set(title="√area of boxes (red: anchors)", xlabel="pixels", ylabel="objects")


def _ious(axis: Any, best_ious: Tensor | None) -> None:
    if best_ious is None:
        axis.set_axis_off()
        return
    axis.hist(best_ious.numpy(), bins=np.linspace(0, 1, 41), color=_BLUE)
    for limit in (0.4, 0.5):
        axis.axvline(limit, color=_RED, linewidth=1)
    below = 100 * float((best_ious < 0.5).float().mean())
    axis.set(title=f"best IoU with an anchor: {below:.1f} % below 0.5", xlabel="IoU", ylabel="objects")
