"""Peak memory of each layer's forward and backward passes, against nn.BatchNorm2d's.

On a CPU it is the memory of a separate process, on CUDA that of torch's allocator.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import textbook
from .fresh import in_fresh_process, peak_of
from .layers import LAYERS, LAYOUTS
from .table import Row

SHAPE = (32, 64, 112, 112)  # 103 MB in float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])


def measure(args: argparse.Namespace) -> Iterator[Row]:
    def measured(*of: Any) -> float:
        if args.device == "cuda":
            return peak(*of, device="cuda")
        return in_fresh_process(peak, *of)

    for layout in args.layouts:
        of_torch = measured("torch", tuple(args.shape), layout)
        for name in args.layers:
            used = {who: measured(who, tuple(args.shape), layout, name) for who in ("ours", "textbook")}
            yield {
                "layer": name,
                "layout": layout,
                **{f"{who} / nn.BatchNorm2d": megabytes / of_torch for who, megabytes in used.items()},
                "MB, nn.BatchNorm2d": of_torch,
            }


def peak(who: str, shape: tuple[int, ...], layout: str, name: str = "BN", device: str = "cpu") -> float:
    """Megabytes of one training step at its peak, beyond the input and the gradient of the output."""
    torch.set_num_threads(1)
    ours, theirs = LAYERS[name](*shape[:2])
    layer = {"ours": ours, "torch": nn.BatchNorm2d(shape[1]), "textbook": textbook.Textbook(theirs, shape[1])}[who]
    layer.to(device)
    x, grad = (torch.randn(shape, device=device).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    small = x[:, :, :8, :8].contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    layer(small).sum().backward()  # what is loaded at the first use is not measured
    x.requires_grad_()
    return (_peak_of_cuda if device == "cuda" else _peak_of_process)(lambda: layer(x).backward(grad))


def _peak_of_process(run: Callable[[], object]) -> float:
    return peak_of(run)[1]


def _peak_of_cuda(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
