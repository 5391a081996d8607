"""Several forwards through one model in step: each waits at a meeting point until all are there.

So the statistics of a layer can be taken over all batches before any of them goes on, at the cost of one forward pass
each: exact population statistics (*Rethinking "Batch"*, App. A.3) and virtual batches (App. A.5) in one pass, where
layer after layer would be quadratic in the depth.
"""

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

from .parking import Parking

T = TypeVar("T")

_here = threading.local()  # .seat: of the forward that this thread runs


class OutOfStepError(RuntimeError):
    """The forwards do not meet in the same places: the model's control flow differs between its inputs."""


def run_in_step(
    forwards: Iterable[Callable[[], T]],
    combine: Callable[[Any, list[Any]], Sequence[Any]],
    parking: Parking | None = None,
) -> list[T]:
    """Run all `forwards`, one at a time, from meeting to meeting; returns what they return.

    Each has its own thread, with the caller's grad mode, autocast and device, but only one runs at any moment, always
    in the same order: random numbers are drawn reproducibly, and nothing needs a lock.

    Args:
        forwards: functions that call `meet(place, value)` on their way; taken one by one, as they set out.
        combine: `combine(place, values)` with the values of all forwards in their order; returns the answer for each.
        parking: where the tensors of waiting forwards go; None: they stay where they are.

    Raises:
        OutOfStepError: some are at different places, or done while others wait.
        Exception: of a forward or of `combine`. In every case all forwards are ended first; no thread survives.
    """
    seats: list[_Seat] = []
    try:
        for forward in forwards:
            seats.append(_Seat(forward, parking))
            seats[-1].advance()
        while not all(seat.done for seat in seats):
            for i, seat in enumerate(seats):
                _check_in_step(seats[0], seat, i)
            answers = combine(seats[0].place, [seat.value for seat in seats])
            for seat, answer in zip(seats, answers, strict=True):
                seat.value = answer
            for seat in seats:
                seat.advance()
        return [seat.result for seat in seats]
    finally:
        for seat in seats:
            seat.cancel()
        if parking is not None:
            parking.fetch_all()


def meet(place: Hashable, value: Any) -> Any:
    """Wait at `place` until all forwards of this `run_in_step` are there; the answer for this one.

    `value` is a tensor, or a tuple, list or dict of them, or anything without tensors.
    """
    return _here.seat.wait(place, value)


def own(tree: Any) -> None:
    """The tensors in `tree`, made elsewhere, may be parked while this forward waits; they are back when all ends."""
    if _here.seat.parked:
        _here.seat.parked.note(tree)


class _Cancelled(BaseException):
    """Ends a waiting forward; not an Exception, so that a model that catches those does not go on."""


class _Seat:
    """One forward in its thread, which runs only inside `advance`."""

    def __init__(self, forward: Callable[[], Any], parking: Parking | None) -> None:
        self.forward = forward
        self.parked = parking.space() if parking else None
        self.place: Hashable = None
        self.value: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = self.cancelled = False
        self._settings = _thread_settings()
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="domainnorm forward", daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Run to the next meeting, or to the end; raises what the forward raises."""
        self._go.release()
        self._waits.acquire()
        if self.error is not None:
            raise self.error

    def wait(self, place: Hashable, value: Any) -> Any:
        """In the thread: stop here until the next `advance`."""
        self.place, self.value = place, value
        if self.parked:
            self.parked.leave(value)
        self._waits.release()
        self._go.acquire()
        if self.cancelled:
            raise _Cancelled
        if self.parked:
            self.parked.come_back()
        return self.value

    def cancel(self) -> None:
        self.cancelled = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        _here.seat = self
        try:
            if not self.cancelled:
                with ExitStack() as stack:
                    for setting in (*self._settings, *([self.parked] if self.parked else [])):
                        stack.enter_context(setting)
                    self.result = self.forward()
        except _Cancelled:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.done, self.place = True, None
            self._waits.release()


def _check_in_step(first: _Seat, other: _Seat, number: int) -> None:
    if (first.done, first.place) != (other.done, other.place):
        here, there = ("finished" if seat.done else f"at {seat.place}" for seat in (first, other))
        raise OutOfStepError(
            f"forward 0 is {here}, forward {number} {there}: forwards in step need a model that runs its layers in the "
            "same order for every input"
        )


def _thread_settings() -> list[Any]:
    """What torch keeps for each thread, as this one has it, as context managers for another."""
    settings: list[Any] = [
        torch.inference_mode(torch.is_inference_mode_enabled()),
        torch.set_grad_enabled(torch.is_grad_enabled()),
    ]
    for device in ("cpu", "cuda"):
        if device == "cpu" or torch.cuda.is_available():
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            settings.append(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
    if torch.cuda.is_available():
        settings.append(torch.cuda.device(torch.cuda.current_device()))
        settings.append(torch.cuda.stream(torch.cuda.current_stream()))
    return settings
