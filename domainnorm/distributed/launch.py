"""Starting one process per rank, and the device of each."""

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ..errors import UserError


def get_device(name: str) -> torch.device:
    """The device of this rank for a config's `MODEL.DEVICE`: "auto", "cuda" or "cpu"."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("MODEL.DEVICE is 'cuda', but torch finds no CUDA device: set MODEL.DEVICE to cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with the tensors in its lists, tuples (as lists) and dicts on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [to_device(value, device) for value in batch]
    return batch


def launch(
    function: Callable[..., None],
    args: Sequence[Any] = (),
    *,
    device: str = "cpu",
    num_processes: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> None:
    """Run `function(*args)` on every rank: in this process if there is one, else in `num_processes` new ones.

    Under torchrun the processes exist already, and the other arguments but `device` are not used.

    Args:
        device: "cuda" (one GPU per process, NCCL), "cpu" (gloo) or "auto".
        num_processes: on this machine.
        dist_url: where the ranks meet, `tcp://host:port`; "auto" on a single machine.

    Raises:
        UserError: from any rank, with its own message; the other ranks are stopped.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _run_rank(function, args, device, "env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        return
    world = num_processes * num_machines
    if world == 1:
        function(*args)
        return
    get_device(device)  # an error here is one error, not one a rank
    # a rank's error is raised here; that the other ranks are stopped for it needs no line
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    if device != "cpu" and torch.cuda.is_available() and num_processes > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus {num_processes}: this machine has {torch.cuda.device_count()}; "
            "ask for fewer, or set MODEL.DEVICE to cpu to start that many CPU processes"
        )
    if dist_url == "auto" and num_machines > 1:
        raise UserError("--dist-url auto finds ranks of one machine only: give tcp://HOST:PORT of machine 0")
    with tempfile.TemporaryDirectory() as folder:
        if dist_url == "auto":
            dist_url = f"file://{folder}/rendezvous"  # unlike a free port, nobody else can take it
        mistakes = mp.get_context("spawn").SimpleQueue()
        try:
            mp.spawn(
                _run_child,
                (function, args, device, dist_url, machine_rank * num_processes, world, num_processes, mistakes),
                nprocs=num_processes,
            )
        except (mp.ProcessExitedException, mp.ProcessRaisedException):  # the latter: of a rank that lost the others
            if mistakes.empty():
                raise
            raise UserError(mistakes.get()) from None


def _run_child(
    local_rank: int,
    function: Callable[..., None],
    args: Sequence[Any],
    device: str,
    url: str,
    first_rank: int,
    world: int,
    num_processes: int,
    mistakes: Any,
) -> None:
    os.environ["LOCAL_RANK"] = str(local_rank)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))  # else ranks spin against each other
    _run_rank(_report_mistake, (function, args, mistakes), device, url, first_rank + local_rank, world)


def _report_mistake(function: Callable[..., None], args: Sequence[Any], mistakes: Any) -> None:
    try:
        function(*args)
    except UserError as error:
        mistakes.put(str(error))  # while the group lives: when it ends, the other ranks fail and all are stopped
        sys.exit(2)


def _run_rank(function: Callable[..., None], args: Sequence[Any], device: str, url: str, rank: int, world: int) -> None:
    where = get_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", init_method=url, rank=rank, world_size=world)
    try:
        function(*args)
    finally:
        dist.destroy_process_group()
