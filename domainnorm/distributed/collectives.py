"""Ranks, and the few collectives.

Everything works without a process group (one rank) and over any backend (NCCL, gloo).
"""

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None  # None: all ranks

# torch 2.14 deprecates the second name for the first
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def world_size(group: Group = None) -> int:
    """Number of ranks in `group`; 1 where no process group was started."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """This process's place in `group`; 0 where no process group was started."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def sub_group(size: int) -> Group:
    """The process group of this rank among groups of `size` ranks, one after the other; `size` divides all ranks.

    Every rank calls it.
    """
    return None if world_size() in (1, size) else _sub_group(size, dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _sub_group(size: int, world: Any) -> Group:
    return dist.new_subgroups(size)[0]  # as many groups on every rank: once for all layers


def all_gather_stack(x: Tensor, group: Group = None) -> Tensor:
    """The `x` of every rank, all of one shape and dtype, stacked: `(W, *x.shape)`. Not differentiable."""
    out = x.new_empty((world_size(group), *x.shape))
    getattr(dist, ALL_GATHER)(out.view(-1), x.contiguous().view(-1), group=group)
    return out


def all_reduce_sum(x: Tensor, group: Group = None) -> Tensor:
    """The sum of `x` over all ranks; `x` itself is left as it is. Not differentiable."""
    if world_size(group) == 1:
        return x
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_reduce_max(x: Tensor) -> Tensor:
    """The largest `x` of all ranks, in place. Not differentiable."""
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def gather_objects(value: Any, group: Group = None) -> list[Any]:
    """The (picklable) `value` of every rank, in rank order, on every rank."""
    if world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def deepcopy_over_group(module: Any, group: Any, memo: dict[int, Any]) -> Any:
    """For `__deepcopy__`: a copy of `module` over the same process group; a group itself cannot be copied."""
    memo[id(group)] = group
    twin = module.__new__(type(module))
    memo[id(module)] = twin
    twin.__dict__ = copy.deepcopy(module.__dict__, memo)
    return twin


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()
