"""The most memory that each layer's forward and backward hold, against nn.BatchNorm2d's, in processes of their own."""

import argparse
from collections.abc import Iterator

import torch
from torch import nn

from . import textbook
from .fresh import in_fresh_process, peak_of
from .layers import LAYERS, LAYOUTS
from .table import Row

SHAPE = (32, 64, 112, 112)  # 103 MB in float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    for layout in LAYOUTS:
        of_torch = in_fresh_process(peak, "torch", tuple(args.shape), layout)
        for name in LAYERS:
            of = {who: in_fresh_process(peak, who, tuple(args.shape), layout, name) for who in ("ours", "textbook")}
            yield {
                "layer": name,
                "layout": layout,
                **{f"{who} / nn.BatchNorm2d": megabytes / of_torch for who, megabytes in of.items()},
                "MB, nn.BatchNorm2d": of_torch,
            }


def peak(who: str, shape: tuple[int, ...], layout: str, name: str = "BN") -> float:
    """Megabytes of one training step at its peak, beyond the input and the gradient of the output."""
    torch.set_num_threads(1)
    ours, theirs = LAYERS[name](*shape[:2])
    layer = {"ours": ours, "torch": nn.BatchNorm2d(shape[1]), "textbook": textbook.Textbook(theirs, shape[1])}[who]
    x, grad = (torch.randn(shape).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    small = x[:, :, :8, :8].contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    layer(small).sum().backward()  # what is loaded at the first use is not measured
    x.requires_grad_()
    return peak_of(lambda: layer(x).backward(grad))[1]
