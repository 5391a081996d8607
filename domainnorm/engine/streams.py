"""Standard output and error that never end a run: of a pipe whose reader is gone, or a terminal without our letters."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Tolerant:
    """`stream`, but what it cannot take is lost or escaped instead of raised."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):  # ValueError: it is closed
            self._lose()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._lose()

    def _lose(self) -> None:
        """Nobody reads it: also what Python writes to it at its end goes nowhere."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def tolerant_streams() -> Iterator[None]:
    """In this block `print`, logging and progress bars never raise because of where they write to."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # of a process that was started without them
        sys.stdout, sys.stderr = (_Tolerant(nowhere if stream is None else stream) for stream in before)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
