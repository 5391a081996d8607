"""The report of a study from its results: a table and a plot, the same bytes for the same results."""

import io
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from study import Study

from domainnorm.output import replace_file

CONCLUSIONS = "conclusions"  # in the JSON file: what the figures say, in sentences, written by hand


def write_report(study: Study, name: str, content: Mapping[str, Any], folder: Path) -> None:
    """NAME.md and NAME.png."""
    for suffix, data in (("md", markdown(study, name, content).encode()), ("png", plot(study, content))):
        with replace_file(folder / f"{name}.{suffix}", "wb") as stream:
            stream.write(data)


def figures(study: Study, content: Mapping[str, Any], row: str, column: str) -> list[float]:
    """The figures of all seeds that were run."""
    found = (study.value(row, run["results"], column) for run in runs(study, content, row).values())
    return [value for value in found if value is not None]


def runs(study: Study, content: Mapping[str, Any], row: str) -> Mapping[str, Any]:
    """By seed, what has the figures of a row."""
    return content["results"].get(study.rows[row].results_of or row, {})


def markdown(study: Study, name: str, content: Mapping[str, Any]) -> str:
    """Mean ± standard deviation over the seeds, the paper's figures beside them."""
    lines = [f"# {study.title}", "", study.about, ""]
    for title, columns in (study.tables or {"": list(study.columns)}).items():
        lines += [f"## {title}", ""] if title else []
        lines += [*table(study, content, columns), ""]
    lines += ["Mean ± standard deviation over the seeds."]
    lines += ["", f"![{study.title}]({name}.png)", ""]
    if content.get(CONCLUSIONS):
        lines += [*content[CONCLUSIONS], ""]
    every = [run for row in content["results"].values() for run in row.values()]
    known = [run["cpu_seconds"] / 60 for run in every if run.get("cpu_seconds") is not None]
    each = f" of {statistics.median(known):.1f} CPU minutes (median)" if known else ""
    lines += [f"`{content['command']}`: {len(every)} runs{each}, {content['machine']}.", ""]
    return "\n".join(lines)


def table(study: Study, content: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """The rows that have a figure in one of `columns`."""
    has_paper = [column for column in columns if any(column in row.paper for row in study.rows.values())]
    head = ["", *columns, *study.details, *(f"paper: {column}" for column in has_paper), "seeds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key, row in study.rows.items():
        own = [figures(study, content, key, column) for column in columns]
        if not any(own):
            continue
        seeds = ", ".join(sorted(runs(study, content, key), key=int))
        details = (_detail(study, content, key, column) for column in study.details)
        papers = (_number(row.paper.get(column)) for column in has_paper)
        cells = [row.title, *map(_mean, own), *details, *papers, seeds]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(study: Study, content: Mapping[str, Any]) -> bytes:
    """The study's curves; or bars of the means, with a point for each seed."""
    stream = io.BytesIO()
    figure = curves(study, content) if study.plots else bars(study, content)
    figure.savefig(stream, dpi=110, metadata={"Software": None})
    return stream.getvalue()


def curves(study: Study, content: Mapping[str, Any]) -> Figure:
    """Means over the seeds; error bars are standard deviations, the edges of bands means alone."""
    columns = min(len(study.plots), 2)
    rows = -(-len(study.plots) // columns)
    figure = Figure(figsize=(1 + 4.5 * columns, 3.4 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flat
    for drawn, axes in zip(study.plots, places, strict=False):  # in this order: what is left over stays in places
        for label, points in drawn.curves.items():
            known = [(x, v) for x, row, column in points if (v := figures(study, content, row, column))]
            spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in known]
            means = [statistics.mean(v) for _, v in known]
            axes.errorbar([x for x, _ in known], means, spreads, marker="o", markersize=3, capsize=2, label=label)
        for label, edges in drawn.bands.items():
            known = [{x: v for x, row, column in e if (v := figures(study, content, row, column))} for e in edges]
            lower, upper = ([statistics.mean(v) for v in edge.values()] for edge in known)
            axes.fill_between(list(known[0]), lower, upper, alpha=0.4, label=label)
        axes.set(title=drawn.title, xlabel=drawn.x, ylabel=drawn.y)
        if drawn.log:
            ticks = sorted({x for points in drawn.curves.values() for x, _, _ in points})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    for axes in places:
        axes.set_visible(False)
    return figure


def bars(study: Study, content: Mapping[str, Any]) -> Figure:
    """One for each row and column, with a point for each seed."""
    rows = [key for key in study.rows if any(figures(study, content, key, column) for column in study.columns)]
    figure = Figure(figsize=(7, 0.6 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(study.columns)
    for c, column in enumerate(study.columns):
        places = [r + (c - (len(study.columns) - 1) / 2) * height for r in range(len(rows))]
        values = [figures(study, content, key, column) for key in rows]
        axes.barh(places, [statistics.mean(v) if v else 0 for v in values], height * 0.9, label=column, color=f"C{c}")
        for place, own in zip(places, values, strict=True):
            axes.plot(own, [place] * len(own), ".", color="black", markersize=4)
    axes.set_yticks(range(len(rows)), [study.rows[key].title for key in rows])
    axes.invert_yaxis()
    axes.set_xlabel(study.unit)
    axes.grid(True, axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.01)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _detail(study: Study, content: Mapping[str, Any], row: str, column: str) -> str:
    """A mean, or what is said, the most frequent first."""
    entries = [study.entry(row, run["results"], column) for run in runs(study, content, row).values()]
    words = Counter(entry for entry in entries if isinstance(entry, str)).most_common()
    if not words:
        return _mean([entry for entry in entries if entry is not None])
    return words[0][0] if len(words) == 1 else "; ".join(f"{word} ({count})" for word, count in words)


def _mean(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
