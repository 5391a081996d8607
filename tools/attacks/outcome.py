"""What became of the attacks: how many went well, how many were refused in one line, and each that did neither."""

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
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
            self.failures.append({"kind": kind, "seed": self.seed, "number": number, "error": text[:500]})

    def line(self) -> str:
        """All counts in one line."""
        return "; ".join(
            f"{sum(counts.values())} {kind}: "
            + ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items())
            for kind, counts in self.counts.items()
        )
