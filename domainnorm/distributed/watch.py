"""How long the run waits for a rank, or a process that loads data, that does not answer."""

import os
import socket

from ..errors import UserError

VARIABLE = "DOMAINNORM_TIMEOUT"
_DEFAULT = 300.0

_progress: int | None = None


def timeout() -> float:
    """Seconds, from the environment variable `DOMAINNORM_TIMEOUT`; default: five minutes.

    A process that loads data, or a rank that is watched by the process that started it, ends the run after them. A
    collective waits three times as long: in one, the other ranks wait while the first one computes AP or saves.

    Raises:
        UserError: it is no number of seconds.
    """
    text = os.environ.get(VARIABLE) or str(_DEFAULT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < 1e7:
        raise UserError(f"{VARIABLE} takes a number of seconds above 0, got {text!r}")
    return seconds


def this_rank(rank: int) -> str:
    """Where it runs, for messages."""
    return f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"


def set_progress(step: int | None) -> None:
    """Say how far this rank is; None: that says nothing now, as where one rank works and the others wait."""
    global _progress
    _progress = step


def get_progress() -> int | None:
    """What was said last."""
    return _progress
