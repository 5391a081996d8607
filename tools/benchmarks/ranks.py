"""What several processes measure."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from domainnorm.distributed import launch, rank
from domainnorm.errors import UserError

from .table import Row


def check_processes(numbers: Sequence[int]) -> None:
    """UserError if there is one process only somewhere."""
    if min(numbers) < 2:
        raise UserError(f"--processes takes 2 or more, got {min(numbers)}")


def rows_of_ranks(function: Callable[..., Iterator[Row]], args: Sequence[Any], processes: int) -> Iterator[Row]:
    """What `function(*args)`, which runs on every rank, yields on rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows")
        launch(_write_rows, (file, function, args), num_processes=processes)
        yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


def _write_rows(file: Path, function: Callable[..., Iterator[Row]], args: Sequence[Any]) -> None:
    rows = list(function(*args))
    if rank() == 0:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
