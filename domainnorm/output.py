"""The output folder: made or refused at once; a file in it is replaced as a whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import UserError
from .paths import user_path


def output_folder(path: str | Path) -> Path:
    """`path` (with `~` expanded), made if need be.

    Raises:
        UserError: it cannot be made or written to.
    """
    folder = user_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {path}: cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"OUTPUT_DIR {path}: no permission to write there")
    return folder


@contextmanager
def replace_file(file: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `file` that takes its place when the block ends without an error.

    Whoever reads `file`, also after a crash or a power cut, finds either the old content or the new one, whole.
    """
    file = Path(file)
    temporary = file.with_name(f".{file.name}.tmp")  # one writer (rank 0): what a killed one left is overwritten
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # else the new name may reach the disk before the content
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(file: Path, content: Any) -> None:
    """`content` as JSON, into a folder that is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(file) as stream:
        json.dump(content, stream)
