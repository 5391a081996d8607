"""OUTPUT_DIR: of one run, and one process at a time."""

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ..distributed import gather_objects, rank
from ..errors import UserError
from ..output import output_folder, remove_leftovers
from ..paths import user_path

LOCK = ".lock"  # holds who has it; the kernel releases it when that process ends, however it does
_OF_A_RUN = re.compile(r"model_(\d+|final|best|averaged)\.pth|last_checkpoint")


class RunFolder:
    """`OUTPUT_DIR`, locked while this is entered and `claim`ed. Every rank has one, rank 0 the lock.

    Args:
        path: as in the config.
    """

    def __init__(self, path: str) -> None:
        self.path = user_path(path)
        if not str(path).isascii():
            try:
                str(path).encode()
            except UnicodeEncodeError as error:  # which TensorBoard, JSON and YAML cannot write down
                raise UserError(f"OUTPUT_DIR {path}: its name is not UTF-8: choose another one") from error
        self._lock: IO[str] | None = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            (self.path / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def claim(self, *, new: bool) -> None:
        """Lock the folder if it exists; nothing is written to it but the lock.

        Args:
            new: whether a training begins here.

        Raises:
            UserError: on every rank alike: another run has it or, if `new`, it holds an earlier run.
        """
        self._on_rank_0(self._claim, new)

    def open(self) -> Path:
        """The folder, made and locked."""
        self._on_rank_0(self._open)
        return output_folder(self.path)

    def _on_rank_0(self, action: Callable[..., None], *args: Any) -> None:
        message = ""
        if rank() == 0:
            try:
                action(*args)
            except UserError as error:
                message = str(error)
        if message := gather_objects(message)[0]:
            raise UserError(message)

    def _claim(self, new: bool) -> None:
        if not self.path.is_dir():
            return
        if new and (found := earlier_run(self.path)):
            raise UserError(
                f"OUTPUT_DIR {self.path} holds an earlier run ({found}): add --resume to go on with it, choose another "
                "OUTPUT_DIR, or remove that folder"
            )
        if os.access(self.path, os.W_OK | os.X_OK):
            self._take_lock()

    def _open(self) -> None:
        output_folder(self.path)
        if self._lock is None:
            self._take_lock()
        remove_leftovers(self.path)

    def _take_lock(self) -> None:
        file = self.path / LOCK
        while True:
            try:
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise UserError(f"OUTPUT_DIR {self.path}: cannot be locked: {file}: {error.strerror}") from error
            stream = os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                who = _who(stream.read(4096))
                stream.close()
                raise UserError(
                    f"OUTPUT_DIR {self.path} is in use by {who}: wait for its end, or choose another OUTPUT_DIR"
                ) from None
            except OSError:  # a file system without locks
                self._lock = stream
                return
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                break
            stream.close()  # a run that ended just now has deleted it
        stream.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        own = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": since,
        }
        stream.write(json.dumps(own))
        stream.flush()
        self._lock = stream


def earlier_run(folder: Path) -> str:
    """What `folder` holds that a new training would destroy; "": nothing."""
    found = sorted(path.name for path in folder.iterdir() if _OF_A_RUN.fullmatch(path.name))
    if found:
        return found[-1]
    metrics = folder / "metrics.json"
    return metrics.name if metrics.is_file() and metrics.stat().st_size else ""


def _who(text: str) -> str:
    try:
        own = json.loads(text)
        return f"another run (process {own['process']} on {own['host']}, since {own['since']})"
    except (ValueError, KeyError, TypeError):
        return "another run"
