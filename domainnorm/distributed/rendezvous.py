"""Where the ranks meet: an URL, or what another launcher has put into the environment."""

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from ..errors import UserError, cut, one_line
from .watch import VARIABLE, this_rank, timeout

_PATIENCE = 5.0  # seconds that ranks take to come, of which nothing is said
# What torch says in a rank whose others are gone, or do not answer.
_LOST = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|Broken pipe|[Tt]imed? ?out|recvValue|sendBytes")


class LostRanks(UserError):
    """In a collective, other ranks are gone or do not answer: what follows from their end, not what ended the run."""


def ranks_of_environment() -> tuple[int, int] | None:
    """RANK and WORLD_SIZE, where torchrun or another launcher has started this process as one of several.

    Raises:
        UserError: the variables are not those that a process group needs.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    if found.get("WORLD_SIZE") == "1":
        return None
    if not {"RANK", "WORLD_SIZE"} <= found.keys():
        for size in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if os.environ.get(size, "1") != "1":
                raise UserError(
                    f"{size} is {os.environ[size]}: each of these processes would train by itself; start one on each "
                    f"machine, with --num-machines and --machine-rank, or set {', '.join(names)} and LOCAL_RANK"
                )
        return None
    if missing := [name for name in names if name not in found]:
        raise UserError(
            f"RANK is {found['RANK']} and WORLD_SIZE {found['WORLD_SIZE']}, but {' and '.join(missing)} not set: set "
            "what says where the ranks meet, or unset RANK and WORLD_SIZE"
        )
    numbers = [int(found[name]) if found[name].isdecimal() else -1 for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    if min(numbers) < 0 or numbers[0] >= numbers[1] or not 0 < numbers[2] < 65536:
        raise UserError(
            f"RANK {found['RANK']!r}, WORLD_SIZE {found['WORLD_SIZE']!r} and MASTER_PORT {found['MASTER_PORT']!r} "
            "take a number below WORLD_SIZE, the number of processes, and a port"
        )
    _check_host("MASTER_ADDR", found["MASTER_ADDR"])
    return numbers[0], numbers[1]


def check_url(url: str) -> None:
    """Refuse what is no `tcp://HOST:PORT` (or torch's `file://`) before a process is started for it.

    Raises:
        UserError: what is wrong with it.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme == "file" and parts.path:
        return
    if parts.scheme != "tcp" or not host or not port or parts.path.strip("/"):
        raise UserError(f"--dist-url takes tcp://HOST:PORT of machine 0, got {url!r}")
    _check_host("--dist-url", host)


def _check_host(source: str, host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"{source}: the host {host!r} is not known ({error}): give machine 0's name or address"
        ) from error


@contextmanager
def process_group(device: torch.device, url: str, rank: int, world: int) -> Iterator[None]:
    """In this block, this process is one of `world` ranks.

    Raises:
        UserError: they cannot meet; `LostRanks`: others do not come, or do not answer any more.
    """
    where = url if url != "env://" else f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    where = "this machine" if where.startswith("file://") else where
    seconds = 3 * timeout()
    says = f"waiting at {where} for the other ranks, up to {seconds:g} s; this is {this_rank(rank)} of {world}"
    waiting = threading.Timer(_PATIENCE, print, [says], {"flush": True})
    waiting.daemon = True
    waiting.start()
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=url, rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
        )
        if backend == "gloo":
            dist.barrier()  # one that has nothing to exchange would leave while others still connect to it
    except (RuntimeError, ValueError, OSError) as error:
        raise _alone(where, str(error), world, seconds) from error
    finally:
        waiting.cancel()
    try:
        yield
    except RuntimeError as error:
        if is_lost(error):
            reason = cut(one_line(error), 300)
            raise LostRanks(f"{this_rank(rank)} lost the other ranks, whose own output says why: {reason}") from error
        raise
    finally:
        dist.destroy_process_group()


def is_lost(error: Exception) -> bool:
    """Whether it says that other ranks are gone, or do not answer."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_LOST.search(str(error))))


def _alone(where: str, error: str, world: int, seconds: float) -> UserError:
    """Why a rank met no others."""
    if re.search(r"EADDRINUSE|[Aa]ddress already in use", error):
        return UserError(f"{where}: the port is in use by another program: choose another one")
    if re.search(r"[Tt]im(ed|e) ?out|[Cc]onnection (refused|reset|closed)|unreachable|connect", error):
        return LostRanks(
            f"{where}: the {world} ranks did not all come within {seconds:g} s: start the command on every machine "
            f"with the same address, which each must reach; {VARIABLE} is a third of the time to wait"
        )
    return UserError(f"{where}: the ranks cannot meet: {cut(one_line(error), 300)}")
