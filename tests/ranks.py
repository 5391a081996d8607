"""Run a test function in several real processes over gloo, and count their collectives."""

import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from domainnorm.distributed import ALL_GATHER


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """`function(rank, *args)` on every rank of a gloo group; the results in rank order.

    A rank that raises fails the test with its traceback; ranks that hang fail it after `timeout` seconds.
    """
    mp.get_context("forkserver").set_forkserver_preload(["torch", "torchvision", "domainnorm"])
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.start_processes(
            _rank,
            (function, args, world_size, folder, warnings.filters),
            world_size,
            join=False,
            start_method="forkserver",
        )
        deadline = time.monotonic() + timeout
        while not processes.join(timeout=1):
            if time.monotonic() > deadline:
                for process in processes.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} hangs on {world_size} ranks")
        return [torch.load(f"{folder}/{r}.pt", weights_only=False) for r in range(world_size)]


def _rank(
    rank: int, function: Callable[..., Any], args: tuple, world_size: int, folder: str, filters: list[Any]
) -> None:
    warnings.filters[:] = filters  # what is an error in the tests is one here
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        torch.save(function(rank, *args), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


class Counted:
    """Counts the calls of every collective of torch.distributed."""

    NAMES = (
        "all_reduce",
        "all_gather",
        ALL_GATHER,
        "reduce_scatter_tensor",
        "broadcast",
        "all_to_all_single",
    )

    def __enter__(self):
        self.calls = []
        self.patches = []
        for name in self.NAMES:
            original = getattr(dist, name)

            def counting(*args, _name=name, _original=original, **kwargs):
                self.calls.append(_name)
                return _original(*args, **kwargs)

            self.patches.append(mock.patch.object(dist, name, counting))
            self.patches[-1].start()
        return self.calls

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()
