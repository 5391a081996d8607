"""Starting one process per rank, and the device of each."""

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .collectives import world_size
from .rendezvous import check_url, is_lost, process_group, ranks_of_environment
from .supervise import run_ranks
from .watch import timeout

SHARED_FOLDER = "DOMAINNORM_SHARED_FOLDER"  # environment variable: where processes of a run put what they share


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

    Under torchrun, or another launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, the processes exist
    already.

    Args:
        device: "cuda" (one GPU per process, NCCL), "cpu" (gloo) or "auto".
        num_processes: on this machine.
        dist_url: where the ranks meet, `tcp://host:port`; "auto" on a single machine.

    Raises:
        UserError: the first of any rank, with its own message; the other ranks are stopped. One that does not answer
            for `DOMAINNORM_TIMEOUT` seconds is named.
        Stopped: Ctrl-C or SIGTERM, which the ranks get, too.
    """
    world = num_processes * num_machines
    timeout()
    if num_machines == 1 and (found := ranks_of_environment()):
        if world > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise UserError(
                f"--num-gpus {num_processes}: another launcher has started {found[1]} processes (WORLD_SIZE): leave "
                "--num-gpus out, or unset RANK and WORLD_SIZE"
            )
        count = torch.cuda.device_count()
        os.environ.setdefault("LOCAL_RANK", str(found[0] % count if count else found[0]))
        _run_rank(function, args, device, "env://", *found)
        return
    if world == 1:
        function(*args)
        return
    get_device(device)  # an error here is one error, not one a rank
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
        check_url(dist_url)
        first = machine_rank * num_processes
        own = (function, args, device, dist_url, world, num_processes, folder)
        run_ranks(_run_child, own, range(first, first + num_processes))


def local_world_size() -> int:
    """How many ranks this machine has; where a launcher does not say it, all of them."""
    found = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(int(found), world_size()) if found.isdecimal() and int(found) else world_size()


def _run_child(
    local_rank: int,
    rank: int,
    function: Callable[..., None],
    args: Sequence[Any],
    device: str,
    url: str,
    world: int,
    num_processes: int,
    folder: str,
    report: Callable[[Exception], None],
) -> None:
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(local_rank), str(num_processes)
    os.environ[SHARED_FOLDER] = folder
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))  # else ranks spin against each other
    _run_rank(_reported, (function, args, report), device, url, rank, world)


def _reported(function: Callable[..., None], args: Sequence[Any], report: Callable[[Exception], None]) -> None:
    """Tell of an error while the group lives: when it ends, the other ranks fail for that alone."""
    try:
        function(*args)
    except Exception as error:
        if not is_lost(error):
            report(error)
        raise


def _run_rank(function: Callable[..., None], args: Sequence[Any], device: str, url: str, rank: int, world: int) -> None:
    where = get_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    with process_group(where, url, rank, world):
        function(*args)
