"""Each layer, forward and backward, against nn.BatchNorm2d and the textbook version of its paper."""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import domainnorm as dn

from . import textbook
from .table import Row
from .timing import milliseconds, ratio, times

LARGE = ((32, 64, 56, 56), (8, 256, 28, 28))
SMALL = ((32, 512, 7, 7), (64, 256, 4, 4), (8, 64, 8, 8), (256, 1024, 1, 1))
ON_A_GPU = ((64, 256, 56, 56),)  # does not fit into its cache
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
ALPHA = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=25, help="number of rounds; the median of their ratios is taken")
    parser.add_argument("--layers", nargs="+", help="names of layers; all by default")
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, metavar="NxCxHxW", help="each in both layouts; by default those of the docs"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])


def measure(args: argparse.Namespace) -> Iterator[Row]:
    large = (*LARGE, *ON_A_GPU) if args.device == "cuda" else LARGE
    for shapes, layouts in ((args.shapes or large, LAYOUTS), (() if args.shapes else SMALL, ["NCHW"])):
        for shape in shapes:
            for layout in layouts:
                for name in args.layers or [*LAYERS, "example weighing"]:
                    yield _row(name, shape, layout, args)


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in text.split("x"))
    if len(shape) != 4:
        raise ValueError(text)
    return shape


def _row(name: str, shape: tuple[int, ...], layout: str, args: argparse.Namespace) -> Row:
    torch.manual_seed(0)
    x, grad = (
        v.to(args.device, memory_format=LAYOUTS[layout]) for v in (torch.randn(shape) * 2 + 1, torch.randn(shape))
    )
    if name == "example weighing":
        peers = _weighing(shape[1])
        runs = {who: _inference(layer.to(args.device), x) for who, layer in peers.items()}
    else:
        ours, theirs = LAYERS[name](*shape[:2])
        peers = {"ours": ours, "torch": nn.BatchNorm2d(shape[1]), "textbook": textbook.Textbook(theirs, shape[1])}
        if name != "BN":
            peers["our BN"] = dn.DomainBatchNorm(shape[1])
        runs = {who: _training(layer.to(args.device), x, grad) for who, layer in peers.items()}
    torch.testing.assert_close(runs["ours"](), runs["textbook"](), atol=1e-4, rtol=1e-4)
    taken = times(runs, args.repeats, seconds=0.01, device=args.device)
    row = {
        "layer": name,
        "shape": "x".join(map(str, shape)),
        "layout": layout,
        "ours / nn.BatchNorm2d": ratio(taken, "ours", "torch"),
        "textbook / nn.BatchNorm2d": ratio(taken, "textbook", "torch"),
        "ours / textbook": ratio(taken, "ours", "textbook"),
        "ours / our BN": ratio(taken, "ours", "our BN") if "our BN" in taken else "",
    }
    if args.device == "cuda":
        row |= {f"ms, {who}": milliseconds(taken, key) for who, key in (("ours", "ours"), ("nn.BatchNorm2d", "torch"))}
        # Read and written at least: the input and the output; in training the gradients of both, and the input again.
        tensors = 2 if name == "example weighing" else 5
        row["GB/s, ours"] = tensors * x.numel() * x.element_size() / 1e6 / milliseconds(taken, "ours")
    return row


def _training(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    x = x.clone().requires_grad_()

    def run() -> Tensor:
        x.grad = None
        layer(x).backward(grad)
        assert x.grad is not None
        return x.grad

    return run


def _inference(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    layer.eval()

    def run() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return run


def _weighing(channels: int) -> dict[str, nn.Module]:
    mean, var = torch.zeros(channels), torch.ones(channels)
    normalize = textbook.weighed(mean, var, ALPHA)
    ours = dn.set_example_weight(nn.Sequential(dn.DomainBatchNorm(channels)), ALPHA)
    return {"ours": ours, "torch": nn.BatchNorm2d(channels), "textbook": textbook.Textbook(normalize, channels)}


Normalize = Callable[[Tensor, Tensor, Tensor], Tensor]


def _batch_norm(batch: int, channels: int) -> tuple[nn.Module, Normalize]:
    return dn.DomainBatchNorm(channels), textbook.ghost(batch)


def _ghost(batch: int, channels: int) -> tuple[nn.Module, Normalize]:
    return dn.GhostBatchNorm(channels, samples_per_group=batch // 4), textbook.ghost(batch // 4)


def _seq_norm(batch: int, channels: int) -> tuple[nn.Module, Normalize]:
    return dn.SeqNorm(channels, num_channel_groups=4, num_sample_groups=4), textbook.seq_norm(4, batch // 4)


def _batch_group(batch: int, channels: int) -> tuple[nn.Module, Normalize]:
    return dn.BatchGroupNorm(channels, num_groups=16), textbook.batch_group(16)


def _grouped(batch: int, channels: int) -> tuple[nn.Module, Normalize]:
    return dn.GroupedBatchNorm(channels, num_channel_groups=16, samples_per_group=2), textbook.grouped(16, 2)


def _batch_renorm(batch: int, channels: int) -> tuple[nn.Module, Normalize]:
    layer = dn.BatchRenorm(channels, r_max=3.0, d_max=5.0, momentum=0.0)  # the averages stay
    return layer, textbook.batch_renorm(torch.zeros(channels), torch.ones(channels), 3.0, 5.0)


LAYERS: dict[str, Callable[[int, int], tuple[nn.Module, Normalize]]] = {
    "BN": _batch_norm,
    "GhostBN": _ghost,
    "SeqNorm": _seq_norm,
    "BGN": _batch_group,
    "GBGN": _grouped,
    "BRN": _batch_renorm,
}
