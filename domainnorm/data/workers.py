"""How many processes load data."""

import os

from fvcore.common.config import CfgNode

from ..distributed import local_world_size

_MAX_WORKERS = 16  # of one rank: more hardly help, and each holds batches in memory


def num_workers(cfg: CfgNode) -> int:
    """`DATALOADER.NUM_WORKERS`, or for -1 the cores that this process may use, over the ranks on this machine."""
    number: int = cfg.DATALOADER.NUM_WORKERS
    if number >= 0:
        return number
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // local_world_size(), 1), _MAX_WORKERS)
