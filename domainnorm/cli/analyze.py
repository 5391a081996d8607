"""Report what the model of a config costs, and what each of its norms normalizes together.

    domainnorm analyze --config-file F [--size HEIGHT WIDTH] [--number N] KEY VALUE …

Prints parameters and multiply-adds of each part, the time per image and the normalization batches. The images are the
first of DATASETS.TEST or, with --size, noise.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from ..config import load_config
from ..data import test_loader
from ..distributed import get_device
from ..engine.analyze import costs, seconds_per_image
from ..engine.describe import normalization_batches
from ..engine.describe_data import table
from ..errors import UserError
from ..modeling import build_model
from . import Parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """KEY VALUE pairs may stand before, between or after the others."""
    parser = Parser(description="Report what the model of a config costs.", allow_abbrev=False)
    parser.add_argument("--config-file", metavar="FILE", required=True, help="a YAML file, or its name in configs/")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="use noise of this size instead of images"
    )
    parser.add_argument("--number", type=int, default=10, help="number of images")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config options, which override those of FILE")
    args = parser.parse_intermixed_args(argv)
    for name, values in (("--number", [args.number]), ("--size", args.size or [])):
        if any(value < 1 for value in values):
            parser.error(f"{name} takes numbers from 1 on, got {min(values)}")
    return args


def analyze(cfg: CfgNode, number: int, size: Sequence[int] | None) -> str:
    """Analyze the model of `cfg`; returns the report as text.

    Raises:
        UserError: what is wrong with the config or the test set.
    """
    device = get_device(cfg.MODEL.DEVICE)
    model = build_model(cfg).eval()
    images, source = _images(cfg, number, size)
    images = [image.to(device) for image in images]
    parts = costs(model, images)
    whole = parts[0].multiply_adds
    rows = [
        {
            "part": part.name or "all",
            "parameters": f"{part.parameters:,}",
            "trained": f"{part.trained:,}",
            "10^9 multiply-adds": f"{part.multiply_adds / 1e9:.3f}",
            "share": f"{100 * part.multiply_adds / whole:.1f} %" if whole else "-",
        }
        for part in (*parts[1:], parts[0])
    ]
    shapes = sorted({f"{image.shape[1]} x {image.shape[2]}" for image in images})
    shown = ", ".join(shapes[:3]) + (", …" if len(shapes) > 3 else "")
    took = seconds_per_image(model, images)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    norms = [
        {"norms in": part, "layers": str(layers), "what one normalizes together in training": text}
        for part, layers, text in normalization_batches(cfg, model)
    ]
    return "\n".join(
        [
            f"{cfg.MODEL.META_ARCHITECTURE}, {len(images)} images of {source}, {shown} pixels",
            "",
            *table(rows),
            "(multiply-adds of convolutions and matrix products: what fvcore and most papers call FLOPs)",
            "",
            f"time per image: {1000 * took:.1f} ms (median, one at a time, {device}{threads})",
            "",
            *(table(norms, left=True) if norms else ["no norms"]),
        ]
    )


def _images(cfg: CfgNode, number: int, size: Sequence[int] | None) -> tuple[list[Tensor], str]:
    side = cfg.INPUT.CROP_SIZE if cfg.MODEL.META_ARCHITECTURE == "Classifier" else cfg.INPUT.MIN_SIZE_TEST
    if not size and cfg.DATASETS.TEST:
        batches = iter(test_loader(cfg, cfg.DATASETS.TEST[0], rank=0, world_size=1))
        found = itertools.islice((image for images, _ in batches for image in images), number)
        return list(found), cfg.DATASETS.TEST[0]
    height, width = size or (side, side)
    return [torch.rand(3, height, width) for _ in range(number)], "noise"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after a mistake in what the user gave."""
    try:
        args = parse(argv)
        print(analyze(load_config(args.config_file, args.opts), args.number, args.size))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
