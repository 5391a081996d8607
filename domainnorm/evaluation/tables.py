"""Results as text: a table of all classes together, and one of each class."""

import math
import re
from collections.abc import Sequence
from typing import Any

from ..errors import cut

_UNSHOWN = ("ARs", "ARm", "ARl")  # in results.json; a table with them is wider than a terminal
_WIDTH = 112  # of a table of classes, in which they stand in as many columns as fit
_MAX_CLASSES = 100  # in a table: of more, those of the lowest scores
_MAX_NAME = 24

Scores = dict[str, dict[str, float]]  # of each kind ("bbox", "segm" or "classification") its metrics
Results = dict[str, dict[str, Scores]]  # of each statistics and data set


def format_table(results: Results) -> str:
    """What holds over all classes, one line for each statistics, data set and kind of AP.

    Args:
        results: `{statistics: {data set: {"bbox": {"AP": …}}}}`.
    """
    several = len(next(iter(results.values()))) > 1
    rows: list[list[str]] = []
    metrics: list[str] = []
    for name, sets in results.items():
        for data_set, scores in sets.items():
            for kind, values in scores.items():
                shown = {metric: value for metric, value in overall(values).items() if metric not in _UNSHOWN}
                labels = [name, *([data_set] if several else []), *([kind] if len(scores) > 1 else [])]
                rows.append([" ".join(labels), *map(number, shown.values())])
                metrics = list(shown)
    width = max(len("statistics"), *(len(row[0]) for row in rows))
    rows.insert(0, ["statistics", *metrics])
    return "\n".join(f"{row[0]:<{width}}" + "".join(f"{cell:>8}" for cell in row[1:]) for row in rows)


def format_classes(results: Results) -> str:
    """The scores of each class, all statistics side by side, one table for each data set and kind of AP.

    "" where there is one class. Many classes stand in several columns; of more than 100, those of the lowest scores.

    Args:
        results: as in `format_table`.
    """
    tables = []
    first = next(iter(results.values()))
    for data_set, scores in first.items():
        for kind in scores:
            found = {name: by_class(sets[data_set][kind]) for name, sets in results.items() if data_set in sets}
            if len(next(iter(found.values()))) > 1:
                title = " ".join(
                    ["classes", *([data_set] if len(first) > 1 else []), *([kind] if len(scores) > 1 else [])]
                )
                tables.append(_classes(title, found))
    return "\n\n".join(tables)


def format_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text, of columns as wide as what is in them; numbers end below each other."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [all(_is_number(row[k]) for row in rows) for k in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if of_numbers else cell.ljust(width)
            for cell, width, of_numbers in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def overall(values: dict[str, Any]) -> dict[str, Any]:
    """The metrics of all classes together."""
    return {metric: value for metric, value in values.items() if "-" not in metric}


def by_class(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics of each class: `{"AP-cat": 1.0, "AR-cat": 2.0}` as `{"cat": {"AP": 1.0, "AR": 2.0}}`."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        metric, _, name = key.partition("-")
        if name:
            found.setdefault(name, {})[metric] = value
    return found


def number(value: float | None) -> str:
    """Two decimals; "-" for nan, which is null in a file."""
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def _classes(title: str, found: dict[str, dict[str, dict[str, float]]]) -> str:
    first = next(iter(found.values()))
    metrics = list(next(iter(first.values())))
    names = list(first)
    if len(names) > _MAX_CLASSES:
        names = sorted(names, key=lambda name: _order(first[name][metrics[0]]))[:_MAX_CLASSES]
        title += f" ({_MAX_CLASSES} of {len(first)}, the lowest {metrics[0]} first)"
    several = len(found) > 1
    wide = {name: max(8 * len(metrics), len(name) + 2 if several else 0) for name in found}  # the columns of each
    cells = {
        name: "".join(
            f"{''.join(f'{number(values[name][metric]):>8}' for metric in metrics):>{wide[statistics]}}"
            for statistics, values in found.items()
        )
        for name in names
    }
    width = min(_MAX_NAME, max(map(len, [*names, "class"])))
    columns = max(1, min((_WIDTH + 4) // (width + sum(wide.values()) + 4), -(-len(names) // 8)))
    lines = -(-len(names) // columns)
    columns = -(-len(names) // lines)  # none is empty
    heads = [" " * width + "".join(f"{name:>{wide[name]}}" for name in found)] if several else []
    heads.append(
        f"{'class':<{width}}"
        + "".join(f"{''.join(f'{metric:>8}' for metric in metrics):>{wide[name]}}" for name in found)
    )
    text = ["    ".join([head] * columns) for head in heads]
    for line in range(lines):
        text.append("    ".join(f"{cut(name, width):<{width}}{cells[name]}" for name in names[line::lines]))
    return "\n".join([title, *text])


def _is_number(text: str) -> bool:
    return text == "-" or text.replace(".", "", 1).replace("-", "", 1).isdecimal()


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value


def file_name(data_set: str) -> str:
    """The folder of a data set's predictions."""
    return re.sub(r"[^\w.-]+", "_", data_set)
