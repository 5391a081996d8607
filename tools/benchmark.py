#!/usr/bin/env python
"""What communication between ranks costs: ratios of times, bytes and calls, on CPU processes over gloo.

    tools/benchmark.py shuffle [--processes 2 4 8] [--rois 512] [--channels 256] [--size 7] [--repeats 7]
    tools/benchmark.py collectives [--processes 2]

`shuffle` compares `RoIShuffle` with the usual way, which gathers all RoIs on every rank: as detectron2's project does
it, and as fast as we could make it. `collectives` counts the calls of torch.distributed in one training step.
"""

import argparse
import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

import domainnorm as dn
from domainnorm.distributed import all_gather_stack, all_reduce_sum, barrier, launch, rank, world_size
from domainnorm.roi_shuffle import Route, roi_permutation

# For the processes started here. glibc gives tensors above 32 MB back to the system when they are freed, and every new
# one costs a page fault per 4 kB: more than what is measured. A GPU's allocator keeps them, and so does this; one
# arena, because gloo's threads allocate, too.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_ARENA_MAX": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_object"),
    *("reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "barrier"),
)
SMALL = "MODEL.DEVICE cpu MODEL.BACKBONE.NAME resnet18 MODEL.FPN.OUT_CHANNELS 16 "
RETINANET = SMALL + "MODEL.RETINANET.NUM_CLASSES 3 MODEL.RETINANET.NORM {}"
MASK_RCNN = SMALL + (
    "MODEL.META_ARCHITECTURE GeneralizedRCNN MODEL.MASK_ON True MODEL.ROI_HEADS.NUM_CLASSES 3 "
    "MODEL.ROI_BOX_HEAD.NUM_CONV 4 MODEL.ROI_BOX_HEAD.NUM_FC 1 MODEL.ROI_BOX_HEAD.CONV_DIM 16 "
    "MODEL.ROI_MASK_HEAD.CONV_DIM 16 MODEL.ROI_BOX_HEAD.NORM {0} MODEL.ROI_MASK_HEAD.NORM {0}"
)
MODES = {f"Mask R-CNN, {norm}": MASK_RCNN.format(norm) for norm in ("BN", "SyncBN", "GN")}
MODES["Mask R-CNN, BN, shuffled"] = MASK_RCNN.format("BN") + " MODEL.ROI_HEADS.SHUFFLE True"
MODES |= {f"RetinaNet, {norm}": RETINANET.format(norm) for norm in ("BN", "SyncBN")}


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


def measure_shuffle(counts: Sequence[int], channels: int, size: int, repeats: int) -> None:
    """On every rank: one row of the table, by rank 0."""
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
    if rank() == 0:
        rois = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        megabytes = (f"{value / 1e6:.2f}" for value in sent)
        ratios = (f"{ratio:.3f}" for ratio in (sent[0] / sent[1], *times[0] / times[1:]))
        print_row(len(counts), rois, *megabytes, *ratios)


def measure_collectives() -> None:
    """On every rank: the table, by rank 0."""
    generator = torch.Generator().manual_seed(rank())
    images = [torch.rand(3, 128, 128, generator=generator) for _ in range(2)]
    boxes = torch.tensor([[8.0, 8, 56, 72], [40, 24, 120, 104], [16, 80, 60, 120]])
    masks = torch.zeros(3, 128, 128, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    for mode, options in MODES.items():
        torch.manual_seed(0)
        model = dn.build_model(dn.load_config(None, options.split())).train()
        with counted() as forward:
            targets = [{"boxes": boxes, "labels": torch.arange(3), "masks": masks} for _ in images]
            loss = sum(model(images, targets).values())
        with counted() as backward:
            loss.backward()
        if rank() == 0:
            cells = (", ".join(f"{n} {name}" for name, n in calls.items()) or "none" for calls in (forward, backward))
            print_row(mode, *cells, (forward + backward).total())


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """The calls of each collective of torch.distributed in this block."""
    calls: Counter[str] = Counter()
    with contextlib.ExitStack() as patches:
        for name in COLLECTIVES:
            original = getattr(dist, name)

            def counting(*args, _name=name, _original=original, **kwargs):
                calls[_name] += 1
                return _original(*args, **kwargs)

            patches.enter_context(mock.patch.object(dist, name, counting))
        yield calls


def print_row(*cells: object) -> None:
    """Of a table in Markdown; at once, because several processes print."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What communication between ranks costs, on CPU processes.")
    commands = parser.add_subparsers(dest="command", required=True)
    shuffle = commands.add_parser("shuffle", help="RoIShuffle against gathering all RoIs on every rank")
    shuffle.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8], help="8 take 22 GB")
    shuffle.add_argument("--rois", type=int, default=512, help="a rank, on average")
    shuffle.add_argument("--channels", type=int, default=256)
    shuffle.add_argument("--size", type=int, default=7, help="height and width of a RoI's features")
    shuffle.add_argument("--repeats", type=int, default=7, help="the median of so many times is taken")
    collectives = commands.add_parser("collectives", help="calls in one training step of each detector and norm")
    collectives.add_argument("--processes", type=int, nargs=1, default=[2])
    args = parser.parse_args(argv)
    if min(args.processes) < 2:
        parser.error(f"--processes takes 2 or more, got {min(args.processes)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    os.environ.update(ENVIRONMENT)
    print(f"{os.cpu_count()} CPU cores, torch {torch.__version__}, gloo, one thread a process\n")
    columns = {
        "collectives": ("mode", "forward", "backward", "total"),
        "shuffle": (
            *("processes", "RoIs a rank", "MB sent, shuffle", "MB sent, all-gather", "bytes, shuffle / all-gather"),
            *("time, shuffle / detectron2's all-gather", "time, shuffle / lean all-gather"),
        ),
    }[args.command]
    print_row(*columns)
    print_row(*["---"] * len(columns))
    for world in args.processes:
        if args.command == "collectives":
            launch(measure_collectives, num_processes=world)
            continue
        for spread in (0, 1):  # even counts; from half the RoIs to one and a half
            counts = [round(args.rois * (1 + spread * (r / (world - 1) - 0.5))) for r in range(world)]
            launch(measure_shuffle, (counts, args.channels, args.size, args.repeats), num_processes=world)


if __name__ == "__main__":
    main()
