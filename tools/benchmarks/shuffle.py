"""RoIShuffle against the usual way, which gathers all RoIs on every rank, on CPU processes over gloo.

The usual way is measured twice: as in detectron2's project, and as fast as we could make it.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

import domainnorm as dn
from domainnorm.distributed import all_gather_stack, all_reduce_sum, barrier, rank, world_size
from domainnorm.distributed.roi_shuffle import Route, roi_permutation

from .ranks import check_processes, rows_of_ranks
from .table import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[2, 4, 8], help="numbers of processes; 8 take 22 GB"
    )
    parser.add_argument("--rois", type=int, default=512, help="RoIs per rank, on average")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--size", type=int, default=7, help="height and width of a RoI's features")
    parser.add_argument("--repeats", type=int, default=7, help="number of timings, of which the median is taken")


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Even counts, and from half the RoIs to one and a half."""
    check_processes(args.processes)
    for world in args.processes:
        for spread in (0, 1):
            counts = [round(args.rois * (1 + spread * (r / (world - 1) - 0.5))) for r in range(world)]
            yield from rows_of_ranks(shuffled_and_gathered, (counts, args.channels, args.size, args.repeats), world)


def spatial_mean(x: Tensor) -> Tensor:
    """`(R, C, H, W)` -> `(R, C)`: a head that costs nearly nothing, so that the way there and back is measured."""
    return x.mean((2, 3))


def all_gather_shuffle(
    gather_rows: Callable[..., Tensor], head: Callable[[Tensor], Tensor], x: Tensor, step: int, seed: int = 0
) -> Tensor:
    """What `RoIShuffle(head, seed)(x)` is in training forward `step` (from 0), the usual way.

    Each rank gathers the features of all, computes its share of a random permutation of them, gathers the outputs of
    all, and takes those of its own RoIs.

    Args:
        gather_rows: `(x, counts, rows)` -> some rows of the concatenation of the `x` of all ranks.
    """
    counts = all_gather_stack(torch.tensor([len(x)])).flatten().numpy()
    first = counts[: rank()].sum()
    permutation = roi_permutation(seed, step, counts.sum())
    splits = len(permutation) * np.arange(world_size() + 1) // world_size()
    y = head(gather_rows(x, counts, permutation[splits[rank()] : splits[rank() + 1]]))
    return gather_rows(y, np.diff(splits), np.argsort(permutation)[first : first + len(x)])


def detectron2_rows(x: Tensor, counts: np.ndarray, rows: np.ndarray) -> Tensor:
    """Step by step as detectron2's project on the paper does it, with the function that it calls."""
    from fvcore.nn.distributed import differentiable_all_gather  # here, because torch warns of what it imports

    padded = torch.cat([x, x.new_zeros((counts.max() - len(x), *x.shape[1:]))])
    parts = [part[:count] for part, count in zip(differentiable_all_gather(padded), counts, strict=True)]
    return torch.cat(parts)[torch.from_numpy(rows)]


def lean_rows(x: Tensor, counts: np.ndarray, rows: np.ndarray) -> Tensor:
    """As fast as we found it to be over gloo: nothing is copied to concatenate it."""
    most, ends = counts.max(), counts.cumsum()
    source = np.searchsorted(ends, rows, side="right")
    places = torch.from_numpy(rows - (ends - counts)[source] + source * most)
    padded = x if len(x) == most else torch.cat([x, x.new_zeros((most - len(x), *x.shape[1:]))])
    return _LeanRows.apply(padded, places)


class _LeanRows(Function):
    """The rows at `places` of all ranks' `x`, one after the other; each row is taken on one rank only."""

    @staticmethod
    def forward(ctx, x, places):
        everyone = x.new_empty((world_size(), *x.shape))
        dist.all_gather(list(everyone), x)  # over gloo faster than all_gather_into_tensor
        ctx.places, ctx.shape = places, everyone.shape
        return everyone.flatten(0, 1).index_select(0, places)

    @staticmethod
    def backward(ctx, grad):
        everyone = grad.new_zeros(ctx.shape)
        everyone.flatten(0, 1).index_copy_(0, ctx.places, grad)
        # A reduce-scatter: over gloo, one reduce to each rank is faster.
        for work in [dist.reduce(of_rank, to, async_op=True) for to, of_rank in enumerate(everyone)]:
            work.wait()
        return everyone[rank()], None


def bytes_sent(counts: Sequence[int], step: int, x: Tensor, y: Tensor) -> tuple[int, int]:
    """What this rank sends to other ranks, forward and backward, shuffled and all-gathered.

    Of features `x` and outputs `y`, where the ranks have `counts` RoIs.
    """
    world = len(counts)
    route = Route.of(roi_permutation(0, step, sum(counts)), counts, rank(), torch.device("cpu"))
    features, outputs = (row.shape[1:].numel() * row.element_size() for row in (x, y))
    moved = sum(route.sent) + sum(route.received) - route.sent[rank()] - route.received[rank()]
    # Padded to the most on any rank; an all-gather or reduce-scatter sends as much as one tensor to each other rank.
    gathered = 2 * (world - 1) * (max(counts) * features + -(-sum(counts) // world) * outputs)
    # Shuffled, features and the gradients of outputs go one way, outputs and the gradients of features the other.
    return moved * (features + outputs), gathered


def shuffled_and_gathered(counts: Sequence[int], channels: int, size: int, repeats: int) -> Iterator[Row]:
    """On every rank: one row of the table."""
    shuffle = dn.RoIShuffle(spatial_mean)
    x = torch.randn(counts[rank()], channels, size, size).requires_grad_()
    ways = [shuffle]
    for rows in (detectron2_rows, lean_rows):
        ways.append(lambda x, rows=rows: all_gather_shuffle(rows, spatial_mean, x, int(shuffle.step) - 1))
    weight = torch.randn(counts[rank()], channels)

    def train(way: Callable[[Tensor], Tensor]) -> tuple[float, Tensor, Tensor]:
        """Seconds of the slowest rank; outputs, input gradients."""
        x.grad = None
        barrier()
        began = time.perf_counter()
        y = way(x)
        y.backward(weight)
        seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds.item(), y, x.grad

    of_ways = [train(way)[1:] for way in ways]  # warm-up, too
    for of_way in of_ways[1:]:
        torch.testing.assert_close(of_ways[0], of_way)
    sent = torch.tensor(bytes_sent(counts, 0, x, of_ways[0][0]), dtype=torch.float64)
    sent = all_reduce_sum(sent) / len(counts)
    del of_ways, of_way  # memory is short
    times = np.median([[train(way)[0] for way in ways] for _ in range(repeats)], axis=0)  # in turn
    yield {
        "processes": len(counts),
        "RoIs a rank": str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}",
        "MB sent, shuffle": sent[0].item() / 1e6,
        "MB sent, all-gather": sent[1].item() / 1e6,
        "bytes, shuffle / all-gather": (sent[0] / sent[1]).item(),
        "time, shuffle / detectron2's all-gather": times[0] / times[1],
        "time, shuffle / lean all-gather": times[0] / times[2],
    }
