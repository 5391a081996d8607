"""Count the attacks: how many went well, how many were refused in one line, and list each that did neither."""

import json
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

MAX_SECONDS = 30  # of one attack


def refusal(error: Exception | None, start: float) -> str | None:
    """The line of an error; None for none.

    Raises:
        AssertionError: it is not one line that can be printed, or took longer than `MAX_SECONDS` since `start`.
    """
    seconds = time.perf_counter() - start
    assert seconds < MAX_SECONDS, f"took {seconds:.0f} s"
    if error is None:
        return None
    message = str(error)
    assert message.isprintable() and 0 < len(message) <= 2000, f"is not one line: {message!r:.200}"
    return message


def in_child(attempt: Callable[[], str | None]) -> str | None:
    """What `attempt` returns, in a process of its own.

    Raises:
        AssertionError: it raised, took longer than `MAX_SECONDS`, or the process died.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(MAX_SECONDS)
            try:
                answer = [attempt(), None]
            except Exception as error:
                answer = [None, _described(error)]
            os.write(writer, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    if not text:
        number = os.waitstatus_to_exitcode(status)
        raise AssertionError("took too long" if number == -signal.SIGALRM else f"the process died: {number}")
    returned, failure = json.loads(text)
    assert failure is None, failure
    return returned


def _described(error: Exception) -> str:
    if isinstance(error, AssertionError):
        return str(error)[:1000]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"[:1000]


class Outcomes:
    """Counts by kind, and the failures.

    Args:
        seed: of the attacks; with the number of one it can be repeated.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.counts: dict[str, Counter[str]] = {}
        self.failures: list[dict[str, Any]] = []

    def count(self, number: int, kind: str, attempt: Callable[[], str | None]) -> None:
        """Make an attempt, which returns None, or the line with which it was refused; another error is a failure."""
        counts = self.counts.setdefault(kind, Counter(went_well=0, refused=0, failed=0))
        try:
            counts["refused" if attempt() else "went_well"] += 1
        except Exception as error:
            counts["failed"] += 1
            self.failures.append({"kind": kind, "seed": self.seed, "number": number, "error": _described(error)})

    def line(self) -> str:
        """All counts in one line."""
        return "; ".join(
            f"{sum(counts.values())} {kind}: "
            + ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items())
            for kind, counts in self.counts.items()
        )
