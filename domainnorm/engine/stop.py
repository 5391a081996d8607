"""Ctrl-C and SIGTERM, taken where nothing is lost."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from ..distributed import all_reduce_max, world_size
from ..errors import Stopped

logger = logging.getLogger(__name__)


class StopSignals:
    """While it is entered, a signal raises `Stopped` or, `later`, waits until all ranks ask for it.

    A second Ctrl-C ends the process at once. Signals that are ignored (nohup) stay so.

    Attributes:
        later: whether signals wait for `number` to be asked.
        saved: the iteration from which a run goes on that is stopped now; 0: from the beginning.
    """

    def __init__(self) -> None:
        self.later = False
        self.saved = 0
        self._number = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody ask for signals
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is Stopped:
            where = f"at {self.saved}" if self.saved else "before anything was saved"
            logger.info("stopped %s; go on with --resume", where)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In this block, whose work can be done again, signals do not wait."""
        before, self.later = self.later, False
        try:
            if self._number:
                raise Stopped(self._number)
            yield
        finally:
            self.later = before

    def number(self, device: torch.device) -> int:
        """The signal that any of the ranks got, 0: none; the same on every rank, each of which asks."""
        if world_size() == 1:
            return self._number
        return int(all_reduce_max(torch.tensor([self._number], device=device)).item())

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._number and number == signal.SIGINT and now - self._since > 0.5:  # some send one twice
            os._exit(128 + number)
        if not self._number:
            self._number, self._since = number, now
            if not self.later:
                raise Stopped(number)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started in this block, and this one until its end, do not get Ctrl-C and SIGTERM.

    Those of a data loader then live as long as this one wants them, also where a whole group of processes is signalled.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
