"""One norm over five pyramid levels, forward and backward, against nn.BatchNorm2d on levels concatenated for free.

On a GPU, one nn.SyncBatchNorm per level is compared, too.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm

import domainnorm as dn

from .table import Row
from .timing import milliseconds, ratio, times

SIZES = {"cpu": ((256, 320), (800, 1088)), "cuda": ((800, 1333),)}  # of images
STRIDES = (8, 16, 32, 64, 128)
PEERS = {
    "shared": ("concatenated before", "concatenate, BatchNorm, split", "five SyncBatchNorms", "eight copies"),
    "shared, compiled": ("concatenated before", "eight copies"),
    "per domain": ("five BatchNorms", "five SyncBatchNorms"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=25, help="number of rounds; the median of their ratios is taken")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--size", type=int, nargs=2, help="height and width of the images; by default those of the docs"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")


class _ConcatenateAndSplit(nn.Module):
    """What detectors do for shared statistics: one BatchNorm on the flattened levels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        flat = self.norm(torch.cat([x.flatten(2) for x in levels], 2)).split([x[0, 0].numel() for x in levels], 2)
        return [y.view(x.shape) for x, y in zip(levels, flat, strict=True)]


class _OneForEach(nn.Module):
    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels) for _ in range(levels)])

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [norm(x) for norm, x in zip(self.norms, levels, strict=True)]


class _SynchronizedEach(_OneForEach):
    """nn.SyncBatchNorm for each level, by the way that it takes with several GPUs: alone it would be a BatchNorm."""

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        group = dist.group.WORLD
        inputs = ((x, n.weight, n.bias, n.running_mean, n.running_var) for x, n in zip(levels, self.norms, strict=True))
        return [SyncBatchNorm.apply(*values, 1e-5, 0.1, group, 1) for values in inputs]


def measure(args: argparse.Namespace) -> Iterator[Row]:
    if args.device == "cuda":  # of one process, for nn.SyncBatchNorm
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        for dtype in args.dtype:
            for size in [args.size] if args.size else SIZES[args.device]:
                yield from _rows(*size, dtype, args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _rows(height: int, width: int, precision: str, args: argparse.Namespace) -> Iterator[Row]:
    channels, dtype, device = args.channels, getattr(torch, precision), args.device
    torch.manual_seed(0)
    sizes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    levels = [torch.randn(args.images, channels, *size).to(device, dtype) for size in sizes]
    whole = [torch.cat([x.flatten(2) for x in levels], 2).unsqueeze(3)]
    shared, apart, compiled = (
        dn.DomainBatchNorm(channels, num_domains=5, sgd_statistics=choice, population_statistics=choice)
        for choice in ("shared", "per_domain", "shared")
    )
    runs = {
        "shared": _run(shared, levels, device),
        "per domain": _run(apart, levels, device),
        "concatenated before": _run(_OneForEach(channels, 1), whole, device),
        "concatenate, BatchNorm, split": _run(_ConcatenateAndSplit(channels), levels, device),
        "five BatchNorms": _run(_OneForEach(channels, 5), levels, device),
        "eight copies": _copies(whole[0]),
    }
    if device == "cuda":
        runs["five SyncBatchNorms"] = _run(_SynchronizedEach(channels, 5), levels, device)
    failure = None
    if not args.no_compile:
        try:
            run = _run(torch.compile(compiled), levels, device)
            run()
            runs["shared, compiled"] = run
        except Exception as error:  # whatever a compiler raises: the others can be measured without it
            failure = error
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for ours, theirs in (("shared", "concatenate, BatchNorm, split"), ("per domain", "five BatchNorms")):
        torch.testing.assert_close(runs[ours](), runs[theirs](), atol=tolerance, rtol=tolerance)
    taken = times(runs, args.repeats, seconds=0.01, device=device)
    for ours, peers in PEERS.items():
        for peer in (peer for peer in peers if {ours, peer} <= runs.keys()):
            row = {
                "image": f"{height}x{width}",
                "statistics": ours,
                "peer": peer,
                "ours / peer": ratio(taken, ours, peer),
            }
            if len(args.dtype) > 1:
                row = {"precision": precision, **row}
            if device == "cuda":
                row |= {
                    "ms, ours": milliseconds(taken, ours),
                    "ms, peer": milliseconds(taken, peer),
                    # as little as can be: two tensors forward, three backward
                    "GB/s, ours": 5 * whole[0].nbytes / 1e6 / milliseconds(taken, ours),
                }
            yield row
    if failure is not None:
        raise failure


def _copies(x: Tensor) -> Callable[[], list[Tensor]]:
    """A copy reads as much as the levels are, and writes as much; a layer does five such passes at least."""
    copies = [torch.empty_like(x) for _ in range(2)]
    return lambda: [copies[k % 2].copy_(x) for k in range(8)]


def _run(norm: Callable[[list[Tensor]], list[Tensor]], levels: list[Tensor], device: str) -> Callable[[], list[Tensor]]:
    if isinstance(norm, nn.Module):
        norm.to(device)
    leaves = [x.detach().clone().requires_grad_() for x in levels]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in levels]

    def run() -> list[Tensor]:
        for x in leaves:
            x.grad = None
        torch.autograd.backward(norm(leaves), grads)
        return [x.grad for x in leaves if x.grad is not None]

    return run
