"""Time candidates in turn, so that other load on the machine affects all alike."""

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP = 3  # runs on a GPU that do not count: kernels are compiled and chosen, and memory is reserved


def times(
    candidates: Mapping[str, Callable[[], object]], repeats: int, seconds: float = 0.0, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; all run in a round, in an order of its own.

    Args:
        repeats: rounds, after two that do not count.
        seconds: a round runs each candidate as often as fits into this time, once at least.
        device: what the candidates run on.

    On one thread it is that thread's own CPU time, on several the wall clock, on CUDA that of events.
    """
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    for run in candidates.values():
        for _ in range(WARM_UP if device == "cuda" else 1):
            run()  # what is compiled is compiled now
    once = {name: clock(run, 1) for name, run in candidates.items()}
    times_a_round = {name: max(1, int(seconds / max(once[name], 1e-9))) for name in candidates}
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(candidates), len(candidates)):
            taken[name].append(clock(candidates[name], times_a_round[name]))
    return taken


def ratio(taken: Mapping[str, list[float]], of: str, to: str) -> float:
    """The median over rounds of the time of one candidate divided by that of another."""
    return statistics.median(a / b for a, b in zip(taken[of], taken[to], strict=True))


def milliseconds(taken: Mapping[str, list[float]], of: str) -> float:
    """The median time of one candidate."""
    return statistics.median(taken[of]) * 1000


def _cpu_seconds(run: Callable[[], object], number: int) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    for _ in range(number):
        run()
    return (clock() - began) / number


def _cuda_seconds(run: Callable[[], object], number: int) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    for _ in range(number):
        run()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000 / number
