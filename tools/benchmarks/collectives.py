"""Number of torch.distributed calls in one training step of each detector and norm, on CPU processes over gloo.

The last row is of times: a synchronized layer's collective for both towers and all levels of RetinaNet's head, relative
to that for one tower and one level.
"""

import argparse
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist

import domainnorm as dn
from domainnorm.distributed import ALL_GATHER, all_gather_stack, all_reduce_sum, barrier, rank

from .ranks import check_processes, rows_of_ranks
from .table import Row

COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "all_gather", ALL_GATHER, "all_gather_object"),
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


CHANNELS = 256  # of a tower
TIME = "time for 2 towers and 5 levels / for one of each"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, nargs=1, default=[2])
    parser.add_argument("--repeats", type=int, default=500, help="number of timings, of which the median is taken")


def measure(args: argparse.Namespace) -> Iterator[Row]:
    check_processes(args.processes)
    yield from rows_of_ranks(calls_of_modes, (), args.processes[0])
    yield from rows_of_ranks(time_of_one, (args.repeats,), args.processes[0])


def calls_of_modes() -> Iterator[Row]:
    """On every rank: a row of the table for each mode."""
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
        cells = [", ".join(f"{n} {name}" for name, n in calls.items()) or "none" for calls in (forward, backward)]
        yield {"mode": mode, "forward": cells[0], "backward": cells[1], "total": (forward + backward).total()}


def time_of_one(repeats: int) -> Iterator[Row]:
    """On every rank: times of what `Moments.merge_ranks` sends for a layer, forward and backward."""
    sizes = {"all": (5, 2 * CHANNELS), "one": (1, CHANNELS)}  # domains, channels of the towers in step
    seconds: dict[str, list[list[float]]] = {name: [] for name in sizes}
    for _ in range(repeats):
        for name, (domains, channels) in sizes.items():
            sent = (torch.ones(domains, 1 + 2 * channels), torch.ones(2, domains, channels))
            barrier()
            times = [time.perf_counter()]
            for run, value in zip((all_gather_stack, all_reduce_sum), sent, strict=True):
                run(value, None)
                times.append(time.perf_counter())
            seconds[name].append([times[1] - times[0], times[2] - times[1], times[2] - times[0]])
    every, one = (torch.tensor(seconds[name], dtype=torch.float64).median(0).values for name in sizes)
    yield {"mode": TIME, **dict(zip(("forward", "backward", "total"), (every / one).tolist(), strict=True))}


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
