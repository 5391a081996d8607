"""Export the trained detector or classifier of a config to one file that runs without this library.

    domainnorm export --config-file F --format torch|onnx --out FILE [--domain NAME|INDEX]
        [--statistics population|minibatch] [--example-weight A] [--fuse] [--boxes] [--atol 1e-5] KEY VALUE …

MODEL.WEIGHTS names the checkpoint. FILE is written only after its outputs were compared with the model's.
"""

import argparse
import sys
from collections.abc import Sequence

from ..config import load_config
from ..engine.checkpoint import other_choices
from ..errors import UserError
from ..modeling import build_model
from ..statistics.example_weight import set_example_weight
from ..surgery.export import FORMATS, Exported, export_model
from . import Parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """KEY VALUE pairs may stand before, between or after the others."""
    parser = Parser(description="Export the trained model of a config.", allow_abbrev=False)
    parser.add_argument("--config-file", metavar="FILE", required=True, help="a YAML file, or its name in configs/")
    parser.add_argument("--format", choices=FORMATS, required=True, help="of the exported file")
    parser.add_argument("--out", metavar="FILE", required=True, help="the exported file")
    parser.add_argument("--domain", help="name or number of the domain, if data sets are the domains of norms")
    parser.add_argument(
        "--statistics", choices=("population", "minibatch"), default="population", help="which statistics normalize"
    )
    parser.add_argument(
        "--example-weight", type=float, help="weight of an image's own moments, under population statistics"
    )
    parser.add_argument("--fuse", action="store_true", help="fold norms into convolutions where possible")
    parser.add_argument(
        "--boxes", action="store_true", help="export a detector that returns final boxes for an image of any size"
    )
    parser.add_argument("--atol", type=float, help="largest allowed difference from the model; 1e-5, with --boxes 1e-4")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config options, which override those of FILE")
    return parser.parse_intermixed_args(argv)


def export(args: argparse.Namespace) -> Exported:
    """Build the model of the config, load its weights and write it to ``args.out``. See :func:`dn.export_model`.

    Raises:
        UserError: the config names no weights, or ``--example-weight`` is not a number of [0, 1].
    """
    cfg = load_config(args.config_file, args.opts)
    if not cfg.MODEL.WEIGHTS:
        raise UserError("MODEL.WEIGHTS is empty: name the checkpoint to export")
    model = build_model(cfg, trained=True)
    if others := other_choices(cfg, cfg.MODEL.WEIGHTS):
        print(f"warning: {others}", file=sys.stderr)
    options = {}
    if cfg.MODEL.META_ARCHITECTURE == "Classifier":
        options["size"] = (cfg.INPUT.CROP_SIZE, cfg.INPUT.CROP_SIZE)
    if args.example_weight is not None:
        try:
            set_example_weight(model, args.example_weight)
        except (TypeError, ValueError) as error:
            raise UserError(f"--example-weight: {error}") from error
    domain = args.domain
    if domain is not None and domain.isdecimal() and domain not in cfg.DATASETS.DOMAINS:
        domain = int(domain)
    return export_model(
        model,
        args.out,
        args.format,
        domain=domain,
        statistics=args.statistics,
        fused=args.fuse,
        boxes=args.boxes,
        atol=args.atol,
        **options,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after a mistake in what the user gave."""
    try:
        args = parse(argv)
        done = export(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    images, checked = (", ".join(map(str, v)) for v in (done.images, done.checked))
    print(f"{args.out}: images ({images}); largest difference {done.difference:.1e}, with (N, H, W) {checked}")
    return 0
