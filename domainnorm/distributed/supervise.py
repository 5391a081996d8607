"""The processes that one command starts, a rank each: watched, stopped and ended together."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, NamedTuple

import torch.multiprocessing as mp

from ..errors import Stopped, UserError
from .rendezvous import LostRanks
from .watch import VARIABLE, get_progress, timeout

_BEAT = 0.5  # seconds from one sign of life of a rank to the next
_LAST_WORDS = 3.0  # seconds in which the others may say, too, what is wrong


class Report(NamedTuple):
    """What ended a rank."""

    when: float
    kind: str  # "mistake": of the user; "error"; "lost": followed from the end of another one
    text: str


class _Rank:
    """One started process, as this one sees it.

    Attributes:
        silent: seconds for which it has not answered.
        progress: what it said last, and `unchanged` seconds ago.
        code: how it ended; None: it was ended with the others.
    """

    def __init__(self, rank: int, process: Any, pipe: Connection) -> None:
        self.rank, self.process, self.pipe = rank, process, pipe
        self.silent = self.unchanged = 0.0
        self.progress: int | None = None
        self.started = False
        self.report: Report | None = None
        self.code: int | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process.pid} on {socket.gethostname()})"

    def read(self, seconds: float) -> None:
        """Take what it sent; `seconds` have gone by since the last time."""
        self.silent, self.unchanged = self.silent + seconds, self.unchanged + seconds
        try:
            while self.pipe.poll():
                message = self.pipe.recv()
                self.started, self.silent = True, 0.0
                if isinstance(message, Report):
                    self.report = self.report or message
                elif message != self.progress:
                    self.progress, self.unchanged = message, 0.0
        except (EOFError, OSError):  # it has ended
            pass


def run_ranks(work: Callable[..., None], args: Sequence[Any], ranks: Sequence[int]) -> None:
    """`work(local_rank, rank, *args)` in a new process for each of `ranks`; all end before this returns.

    Ctrl-C and SIGTERM are handed on, a second Ctrl-C ends all at once; if this process is killed they end, too.

    Raises:
        UserError: of the first rank that failed, or naming the one that does not answer.
        Stopped: after a signal.
        torch.multiprocessing.ProcessRaisedException: with the traceback of the first other error.
    """
    context = multiprocessing.get_context("spawn")
    started: list[_Rank] = []
    with _signals_taken(started) as received, _quiet_children():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until a rank is ready for it
        try:
            for local, rank in enumerate(ranks):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(writer, work, local, rank, args), name=f"rank {rank}")
                process.start()
                writer.close()
                started.append(_Rank(rank, process, reader))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            failure = _watch(started, received)
        finally:
            for one in started:
                one.read(0)
                one.code = one.process.exitcode
            for one in started:
                one.process.kill()
                one.process.join()
    if failure:
        raise UserError(failure)
    _raise_first(started, received)


def _watch(ranks: list[_Rank], received: list[int]) -> str:
    """Until all have ended or one has failed; what is wrong with one that does not answer, else ""."""
    most, turn = timeout(), time.monotonic()
    while alive := [rank for rank in ranks if rank.process.is_alive()]:
        wait([*(rank.process.sentinel for rank in alive)], timeout=_BEAT)
        now = time.monotonic()
        for rank in ranks:
            rank.read(min(now - turn, 2 * _BEAT))  # less than went by where this process itself was stopped
        turn = now
        codes = [rank.process.exitcode for rank in ranks]
        if any(code in (130, 143) for code in codes) and not received:  # one alone got a signal
            for rank in alive:
                rank.process.terminate()
            received.extend(code - 128 for code in codes if code in (130, 143))
        elif any(codes) and not received:
            _wait_for_last_words(ranks)
            return ""
        for rank in alive:
            if rank.started and rank.silent > most:
                return f"{rank} has not answered for {most:g} s ({VARIABLE}): it was stopped, or its machine hangs"
            if rank.unchanged > most and _is_behind(rank, ranks):
                return f"{rank} hangs: the others have waited for it for {most:g} s ({VARIABLE})"
    return ""


def _is_behind(rank: _Rank, ranks: list[_Rank]) -> bool:
    """Whether all others have said that they are further than `rank`."""
    said = [other.progress for other in ranks if other is not rank]
    return rank.progress is not None and all(other is not None and other > rank.progress for other in said)


def _wait_for_last_words(ranks: list[_Rank]) -> None:
    end = time.monotonic() + _LAST_WORDS
    while (left := [rank for rank in ranks if rank.process.is_alive()]) and time.monotonic() < end:
        wait([rank.process.sentinel for rank in left], timeout=_BEAT)


def _raise_first(ranks: list[_Rank], received: list[int]) -> None:
    """What ended the run: the first error that did not follow from another rank's."""
    reports = sorted(
        ((rank.report.when, rank.report, rank) for rank in ranks if rank.report), key=lambda entry: entry[0]
    )
    own = [(report, rank) for _, report, rank in reports if report.kind != "lost"]
    if received and not own:
        raise Stopped(received[0])
    for report, rank in own:
        if report.kind == "mistake":
            raise UserError(report.text)
        message = f"\n\n-- {rank} ended with the following error:\n{report.text}"
        raise mp.ProcessRaisedException(message, rank.rank, rank.process.pid)
    for rank in ranks:
        if rank.code is not None and rank.code < 0:
            name = signal.Signals(-rank.code).name
            raise UserError(f"{rank} was ended by {name}" + ("; is memory short?" if name == "SIGKILL" else ""))
    for _, report, _ in reports:
        raise UserError(report.text)
    for rank in ranks:
        if rank.code:
            raise UserError(f"{rank} ended with exit code {rank.code}")


@contextmanager
def _quiet_children() -> Iterator[None]:
    """Started processes do not print the traces of torch's C++ or warnings of leaked semaphores: one line says it."""
    values = {"TORCH_CPP_LOG_LEVEL": "FATAL", "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning"}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if not before[name]})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]


@contextmanager
def _signals_taken(ranks: list[_Rank]) -> Iterator[list[int]]:
    """The signals that this process gets, each handed on as SIGTERM: Ctrl-C in a terminal reaches the ranks itself."""
    received: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and number in received
        received.append(number)
        for rank in ranks:
            rank.process.kill() if again else rank.process.terminate()

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _child(pipe: Connection, work: Callable[..., None], local: int, rank: int, args: Sequence[Any]) -> None:
    """What a started process does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    lock = threading.Lock()
    threading.Thread(target=_live, args=(pipe, lock), daemon=True).start()
    try:
        work(local, rank, *args, report=lambda error: _send(pipe, lock, _report(error)))
    except Exception as error:
        _send(pipe, lock, _report(error))
        sys.exit(2 if isinstance(error, UserError) else 1)


def _live(pipe: Connection, lock: threading.Lock) -> None:
    """Say that this process lives; when nobody listens any more, it does not."""
    while True:
        try:
            with lock:
                pipe.send(get_progress())
        except OSError:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(_BEAT)


def _send(pipe: Connection, lock: threading.Lock, report: Report) -> None:
    with lock:
        pipe.send(report)


def _report(error: Exception) -> Report:
    if isinstance(error, UserError):
        return Report(time.time(), "lost" if isinstance(error, LostRanks) else "mistake", str(error))
    return Report(time.time(), "error", traceback.format_exc())


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)
