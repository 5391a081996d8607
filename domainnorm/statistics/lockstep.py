"""Several forwards through one model in lockstep: each waits at a barrier until all are there.

So the statistics of a layer can be taken over all batches before any of them goes on, at the cost of one forward pass
each: exact population statistics (*Rethinking "Batch"*, App. A.3) and virtual batches (App. A.5) in one pass, where
layer after layer would be quadratic in the depth.
"""

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

from .offload import ActivationOffloader

T = TypeVar("T")

_local = threading.local()  # .worker: runs a forward in this thread


class OutOfStepError(RuntimeError):
    """The forwards do not reach the same places: the model's control flow differs between its inputs."""


def run_lockstep(
    forwards: Iterable[Callable[[], T]],
    combine: Callable[[Any, list[Any]], Sequence[Any]],
    offloader: ActivationOffloader | None = None,
) -> list[T]:
    """Run all `forwards`, one at a time, from exchange to exchange; returns what they return.

    Each has its own thread, with the caller's grad mode, autocast and device, but only one runs at any moment, always
    in the same order: random numbers are drawn reproducibly, and nothing needs a lock.

    Args:
        forwards: functions that call `barrier_exchange(place, value)` on their way; taken one by one, as they start.
        combine: `combine(place, values)` with the values of all forwards in their order; returns the answer for each.
        offloader: moves the tensors of waiting forwards; None: they stay where they are.

    Raises:
        OutOfStepError: some are at different places, or done while others wait.
        Exception: of a forward or of `combine`. In every case all forwards are ended first; no thread survives.
    """
    workers: list[_Worker] = []
    try:
        for forward in forwards:
            workers.append(_Worker(forward, offloader))
            workers[-1].advance()
        while not all(worker.done for worker in workers):
            for i, worker in enumerate(workers):
                _check_places(workers[0], worker, i)
            answers = combine(workers[0].place, [worker.value for worker in workers])
            for worker, answer in zip(workers, answers, strict=True):
                worker.value = answer
            for worker in workers:
                worker.advance()
        return [worker.result for worker in workers]
    finally:
        for worker in workers:
            worker.cancel()
        if offloader is not None:
            offloader.restore_all()


def barrier_exchange(place: Hashable, value: Any) -> Any:
    """Wait at `place` until all forwards of this `run_lockstep` are there; the answer for this one.

    `value` is a tensor, or a tuple, list or dict of them, or anything without tensors.
    """
    return _local.worker.wait(place, value)


def register_tensors(tree: Any) -> None:
    """The tensors in `tree`, made elsewhere, may be offloaded while this forward waits; they are back when all ends."""
    if _local.worker.tensors:
        _local.worker.tensors.register(tree)


class _Cancelled(BaseException):
    """Ends a waiting forward; not an Exception, so that a model that catches those does not go on."""


class _Worker:
    """One forward in its thread, which runs only inside `advance`."""

    def __init__(self, forward: Callable[[], Any], offloader: ActivationOffloader | None) -> None:
        self.forward = forward
        self.tensors = offloader.track() if offloader else None
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
        """Run to the next exchange, or to the end; raises what the forward raises."""
        self._go.release()
        self._waits.acquire()
        if self.error is not None:
            raise self.error

    def wait(self, place: Hashable, value: Any) -> Any:
        """In the thread: stop here until the next `advance`."""
        self.place, self.value = place, value
        if self.tensors:
            self.tensors.offload(value)
        self._waits.release()
        self._go.acquire()
        if self.cancelled:
            raise _Cancelled
        if self.tensors:
            self.tensors.restore()
        return self.value

    def cancel(self) -> None:
        self.cancelled = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        _local.worker = self
        try:
            if not self.cancelled:
                with ExitStack() as stack:
                    for setting in (*self._settings, *([self.tensors] if self.tensors else [])):
                        stack.enter_context(setting)
                    self.result = self.forward()
        except _Cancelled:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.done, self.place = True, None
            self._waits.release()


def _check_places(first: _Worker, other: _Worker, number: int) -> None:
    if (first.done, first.place) != (other.done, other.place):
        here, there = ("finished" if worker.done else f"at {worker.place}" for worker in (first, other))
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
