"""What runs over several GPUs, in a process group of one: RoI shuffle, collectives, a synchronized layer."""

from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from benchmarks.table import Row
from benchmarks.timing import milliseconds, times
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import domainnorm as dn
from domainnorm import distributed
from domainnorm.distributed import roi_shuffle


def measure(device: str, small: bool) -> Iterator[Row]:
    """One thing a row."""
    here = torch.device(device, 0) if device == "cuda" else None
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=here)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for count in (0, 1, 16 if small else 512):
                for in_order in (False, True):
                    yield _shuffled(count, in_order, dtype, device, small)
        yield _row("moments over ranks", *_merged(device))
        yield _row("a layer with sync=True in DDP", *_synchronized(device))
        yield _row("any object", distributed.gather_objects({"rank": 0}), [{"rank": 0}])
        gathered = [None]
        dist.all_gather_object(gathered, {"rank": 0})
        yield _row("any object, over the group", gathered, [{"rank": 0}])
        distributed.barrier()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _row(what: str, found: object, expected: object) -> Row:
    if isinstance(found, list) and isinstance(found[0], Tensor):
        error = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
        return {"what": what, "error": error, "passed": error < 1e-4}
    return {"what": what, "error": float(found != expected), "passed": found == expected}


def _shuffled(count: int, in_order: bool, dtype: torch.dtype, device: str, small: bool) -> Row:
    """A head shuffled, and not; alone in its group, the shuffle is told that it is one of two, and exchanges."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 49, 16)).to(device, dtype)
    shuffle = dn.RoIShuffle(head, in_order=in_order).train()
    x = torch.randn(count, 8, 7, 7).to(device, dtype)
    found, expected = [], []
    with mock.patch.object(roi_shuffle, "world_size", lambda group=None: 2):
        for module, results in ((shuffle, found), (head, expected)):
            own = x.clone().requires_grad_()
            y = module(own)
            y.square().sum().backward()
            results += [y.detach(), own.grad]
        runs = {"shuffled": lambda: shuffle(x), "head": lambda: head(x)}
        taken = times(runs, 1 if small else 5, device=device)
    errors = [(a - b).abs().max().item() for a, b in zip(found, expected, strict=True) if a.numel()]
    error, limit = max(errors, default=0.0), 1e-4 if dtype == torch.float32 else 5e-2
    return {
        "RoIs": count,
        "type": str(dtype).removeprefix("torch."),
        "in order": in_order,
        "ms, shuffled": milliseconds(taken, "shuffled"),
        "ms, head": milliseconds(taken, "head"),
        "error": error,
        "passed": [y.shape for y in found] == [y.shape for y in expected] and error <= limit,
    }


def _merged(device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Moments gathered over the group, and their gradient, beside those that are not."""
    results = []
    for over_ranks in (True, False):
        x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        merged = dn.Moments.rows(x).merge(0)
        merged = merged.merge_ranks(None) if over_ranks else merged
        (merged.mean.square().sum() + merged.var.square().sum()).backward()
        results.append([merged.mean.detach(), merged.var.detach(), x.grad])
    return results[0], results[1]


def _synchronized(device: str) -> tuple[list[Tensor], list[Tensor]]:
    """A step of a synchronized layer, wrapped for several processes, beside that of torch's BatchNorm."""
    results = []
    for layer in (dn.DomainBatchNorm(3, sync=True), nn.BatchNorm2d(3)):
        layer.to(device)
        wrapped = DistributedDataParallel(layer) if isinstance(layer, dn.DomainBatchNorm) else layer
        x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        y = wrapped(x)
        y.pow(3).sum().backward()
        dn.merge_population_statistics(layer)
        results.append([y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    return results[0], results[1]
