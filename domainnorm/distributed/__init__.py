from .collectives import (
    ALL_GATHER,
    Group,
    all_gather_stack,
    all_reduce_max,
    all_reduce_sum,
    barrier,
    deepcopy_over_group,
    gather_objects,
    rank,
    world_size,
)
from .launch import SHARED_FOLDER, get_device, launch, local_world_size, to_device
from .watch import set_progress, this_rank, timeout

__all__ = [
    "ALL_GATHER",
    "SHARED_FOLDER",
    "Group",
    "all_gather_stack",
    "all_reduce_max",
    "all_reduce_sum",
    "barrier",
    "deepcopy_over_group",
    "gather_objects",
    "get_device",
    "launch",
    "local_world_size",
    "rank",
    "set_progress",
    "this_rank",
    "timeout",
    "to_device",
    "world_size",
]
