"""Rows of measurements as a table in Markdown, and as JSON."""

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]  # of each column its value


def machine() -> str:
    """What the figures are of."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    threads = torch.get_num_threads()
    return f"{device}, torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return f"{len(names)} cores of {names[0].split(':')[1].strip()}" if names else platform.processor()


def show(rows: Iterable[Row], file: Path | None, command: str) -> None:
    """Print each row when it comes; at the end all go to `file`, with the machine and the command."""
    print(f"{machine()}\n")
    shown: list[Row] = []
    for row in rows:
        if not shown:
            _line(row)
            _line(["---"] * len(row))
        _line(f"{v:.3g}" if isinstance(v, float) else v for v in row.values())
        shown.append(row)
    if file is not None:
        content = {"machine": machine(), "command": command, "rows": shown}
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _line(cells: Iterable[object]) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)
