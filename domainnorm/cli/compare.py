"""Compare trainings by their output folders.

    domainnorm compare RUN RUN … [--html FILE]

Prints the options that differ and the results under each statistics. The page FILE also has the training curves.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import OPTIONS, get_value
from ..errors import UserError, cut
from ..evaluation.run_files import KINDS, Run, read_run
from ..evaluation.tables import format_columns, number, overall
from ..output import replace_file
from ..paths import user_path
from . import Parser

_LONGEST = 40  # characters of a cell in a terminal
Table = tuple[list[str], list[list[str]]]  # head and rows


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after a mistake in what the user gave."""
    parser = Parser(description="Compare trainings.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the OUTPUT_DIR of a training")
    parser.add_argument("--html", metavar="FILE", help="also write a page with curves; needs matplotlib")
    try:
        args = parser.parse_args(argv)
        names = run_names(args.runs)
        runs = dict(zip(names, (read_run(folder) for folder in args.runs), strict=True))
        options, scores = differing_options(runs), results(runs)
        short = [[key, *(cut(value, _LONGEST) for value in values)] for key, *values in options[1]]
        print(f"Options that differ\n{format_columns(options[0], short)}\n\nResults\n{format_columns(*scores)}")
        if args.html:
            write_page(user_path(args.html), runs, options, scores)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_names(folders: Sequence[str]) -> list[str]:
    """The names of the folders, or their paths where two have one name.

    Raises:
        UserError: there is one folder, or one comes twice.
    """
    if len(set(folders)) < max(2, len(folders)):
        raise UserError(f"compare takes two or more different output folders, got {list(folders)}")
    names = [user_path(folder).resolve().name for folder in folders]
    return list(folders) if len(set(names)) < len(names) else names


def differing_options(runs: dict[str, Run]) -> Table:
    """A row for each option that differs but OUTPUT_DIR, a column for each run."""
    rows = []
    for key in OPTIONS:
        values = [str(get_value(run.cfg, key)) for run in runs.values()]
        if len(set(values)) > 1 and key != "OUTPUT_DIR":
            rows.append([key, *values])
    return ["option", *runs], rows


def results(runs: dict[str, Run]) -> Table:
    """A row for each data set, kind, statistics and run, so that what compares stands together."""
    found: dict[tuple[str, str, str], dict[str, dict[str, float | None]]] = {}
    metrics: dict[str, None] = {}
    for name, run in runs.items():
        for statistics, sets in run.results.items():
            for data_set, scores in sets.items():
                for kind, values in scores.items():
                    found.setdefault((data_set, KINDS[kind], statistics), {})[name] = overall(values)
                    metrics |= dict.fromkeys(overall(values))
    rows = [
        [*where, name, *(number(values.get(metric)) for metric in metrics)]
        for where, of_runs in sorted(found.items(), key=lambda item: item[0][:2])
        for name, values in of_runs.items()
    ]
    return ["data set", "of", "statistics", "run", *metrics], rows


def write_page(file: Path, runs: dict[str, Run], options: Table, scores: Table) -> None:
    """The tables, and the curves of all runs over each other.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--html needs matplotlib, which is not installed: pip install matplotlib, or leave it out")
    from ..visualization import plots
    from ..visualization.page import Page

    page = Page(f"Comparison of {', '.join(runs)}")
    page.heading("Options that differ")
    page.table(*options, words=len(options[0]))
    page.heading("Results")
    page.table(*scores, words=4)
    names = dict.fromkeys(name for run in runs.values() for m in ("AP", "top1") for name in run.evaluated(m))
    panels = {name: {key: run.series(name) for key, run in runs.items()} for name in ["total_loss", *names]}
    page.heading("Training")
    page.picture(plots.png(plots.lines(panels, "iteration")), "What metrics.json has")
    with replace_file(file) as stream:
        stream.write(str(page))
