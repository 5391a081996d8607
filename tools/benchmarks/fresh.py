"""Run a measurement in its own process and report the memory that it held. For Linux."""

import gc
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` returns there, where what is freed goes back to the system, as usual.

    The process is a copy of one that has imported domainnorm, and done nothing else.
    """
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["domainnorm"])
    with ProcessPoolExecutor(1, context) as fresh:
        return fresh.submit(function, *args).result()


def peak_of(run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run()` returns, and the megabytes that this process held at most meanwhile, beyond those before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = _held("VmRSS")
    result = run()
    return result, _held("VmHWM") - before


def _held(which: str) -> float:
    """Megabytes of this process: now (VmRSS) or at the peak (VmHWM). getrusage's peak is also of who started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024 / 1e6
