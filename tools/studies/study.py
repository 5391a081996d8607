"""What a study is: its rows, the columns of its table, its plots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One training, or one evaluation of what another row has trained.

    Attributes:
        title: in the table.
        config: file, from the root of the project; or a script that takes `--seed` and `--out FOLDER`, and writes
            `results.json` there.
        options: KEY VALUE pairs over the config, or the script's arguments.
        processes: how many train together.
        weights_of: the row that trains what this one evaluates, `../STUDY/ROW` for one of another study; a script gets
            the folder of that run, too.
        results_of: the row whose run has these figures, too: nothing is run for this one.
        columns: the study's columns that are elsewhere in this row's results.
        paper: the paper's figure for each column; None: it has none.
    """

    title: str
    config: str = ""
    options: tuple[str, ...] = ()
    processes: int = 1
    weights_of: str = ""
    results_of: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    paper: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Plot:
    """Curves of the means over the seeds.

    Attributes:
        title, x, y: of it and of its axes.
        curves: label -> its points, each an x, a row, and a column of the study or a path in `results.json`.
        log: whether x has a logarithmic scale.
        bands: label -> the points of its lower and of its upper edge.
    """

    title: str
    x: str
    y: str
    curves: Mapping[str, Sequence[tuple[float, str, str]]] = field(default_factory=dict)
    log: bool = False
    bands: Mapping[str, tuple[Sequence[tuple[float, str, str]], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A table of the paper in small.

    Attributes:
        title: of the report.
        about: what is trained, and what is claimed.
        rows: by their names.
        columns: title -> path in `results.json`, such as `"population/bbox/AP"`.
        tables: title -> the columns that it shows; without any, one table has all columns.
        data: environment variables that it needs, and what each is.
        plots: curves; without any, the report has bars of all rows and columns.
        unit: of the columns.
        details: columns of every table only, words or other figures, likewise.
    """

    title: str
    about: str
    rows: Mapping[str, Row]
    columns: dict[str, str]
    data: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Sequence[str]] = field(default_factory=dict)
    plots: Sequence[Plot] = ()
    unit: str = "AP"
    details: Mapping[str, str] = field(default_factory=dict)

    def value(self, row: str, results: Mapping[str, Any], column: str) -> float | None:
        """The figure of a row in what its run has written; None where it has none."""
        found = self.entry(row, results, column)
        return found if isinstance(found, (int, float)) else None

    def entry(self, row: str, results: Mapping[str, Any], column: str) -> Any:
        """What a run has written for a column, or a detail; None where there is nothing."""
        found: Any = results
        for part in {**self.columns, **self.details, **self.rows[row].columns}[column].split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    def headline(self, row: str, results: Mapping[str, Any]) -> str:
        """The columns of the first table in one line."""
        shown = next(iter(self.tables.values()), self.columns)
        values = ((column, self.value(row, results, column)) for column in shown)
        return ", ".join(f"{column} {value:.1f}" for column, value in values if value is not None)
