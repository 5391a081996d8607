"""The output folder; a file in it is replaced as a whole or not at all."""

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import UserError, reason_of
from .paths import user_path


def output_folder(path: str | Path, name: str = "OUTPUT_DIR") -> Path:
    """`path` (with `~` expanded), made if need be.

    Args:
        name: of the option, for the message.

    Raises:
        UserError: it cannot be made or written to.
    """
    folder = user_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} {str(path)!r}: cannot be made: {reason_of(error)}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{name} {path}: no permission to write there")
    return folder


@contextmanager
def replace_file(file: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `file` that takes its place when the block ends without an error.

    Whoever reads `file`, also after a crash or a power cut, finds either the old content or the new one, whole. The
    temporary file has a name that no other writer has, and is never one that was there, nor a link.

    Raises:
        UserError: it cannot be written, such as for a full disk, or is a device.
    """
    file = Path(file)
    if _is_device(file):
        raise UserError(f"{file} is a device or a pipe, which cannot be replaced: name a file")
    temporary = file.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # else the new name may reach the disk before the content
        os.replace(temporary, file)
        _sync_folder(file.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{file}: cannot be written: {reason_of(error)}; what was there is as it was") from error
        raise


def _is_device(file: Path) -> bool:
    """Whether there is something in that place that is neither a file, nor a folder, nor a link."""
    try:
        mode = file.lstat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files of writers that were killed; nobody may be writing to `folder`."""
    for file in Path(folder).glob(".*.tmp"):
        name = file.name[1:-4]
        if len(name) == 16 and set(name) <= set("0123456789abcdef") and not file.is_dir():
            with suppress(OSError):
                file.unlink()


def write_json(file: Path, content: Any) -> None:
    """`content` as JSON, into a folder that is made if need be."""
    output_folder(file.parent)
    with replace_file(file) as stream:
        json.dump(content, stream)


def _sync_folder(folder: Path) -> None:
    """The new name reaches the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have no such thing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
