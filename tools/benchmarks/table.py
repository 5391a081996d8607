"""Rows of measurements as a table in Markdown, and as JSON."""

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # of each column its value


def machine() -> str:
    """What the figures are of."""
    import torch  # here, because what only writes tables needs not wait for it

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    threads = torch.get_num_threads()
    return f"{device}, torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return f"{len(names)} cores of {names[0].split(':')[1].strip()}" if names else platform.processor()


def show(rows: Iterable[Row], file: Path | None, command: str) -> None:
    """Print each row when it comes, and write all so far to `file`, with the machine and the command.

    What was measured is then kept if the process is stopped. Rows of other columns than those before begin a new table.
    """
    print(f"{machine()}\n")
    shown: list[Row] = []
    for row in rows:
        # the head, its rule and the row before are printed already
        print(*lines([*shown[-1:], row])[3 if shown else 0 :], sep="\n", flush=True)
        shown.append(row)
        if file is not None:
            _replace(file, {"machine": machine(), "command": command, "rows": shown})


def lines(rows: Iterable[Row]) -> list[str]:
    """Tables in Markdown: rows of the same columns are one table."""
    found: list[str] = []
    columns: list[str] = []
    for row in rows:
        if [*row] != columns:
            found += [""] * bool(found) + [_line(row), _line(["---"] * len(row))]
            columns = [*row]
        found.append(_line(f"{v:.3g}" if isinstance(v, float) else v for v in row.values()))
    return found


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _replace(file: Path, content: dict[str, Any]) -> None:
    """The file is there as a whole at any time."""
    written = file.with_name(file.name + ".part")
    written.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(written, file)
