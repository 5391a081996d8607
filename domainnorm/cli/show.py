"""Draw the data of a config: the annotation files as they are, or the images that the model is trained on.

    domainnorm show --config-file F --source annotations|loader [--number N] --out FILE.png|FILE.html KEY VALUE …

The loader's pictures are the images of the first iterations, after all transforms.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import load_config
from ..errors import UserError
from ..output import output_folder
from ..paths import user_path
from ..visualization.samples import annotated, loaded
from ..visualization.sheet import check_suffix, write_pictures
from . import Parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """KEY VALUE pairs may stand before, between or after the others."""
    parser = Parser(description="Draw the data of a config.", allow_abbrev=False)
    parser.add_argument("--config-file", metavar="FILE", required=True, help="a YAML file, or its name in configs/")
    parser.add_argument(
        "--source", choices=("annotations", "loader"), required=True, help="what the files say, or what the model sees"
    )
    parser.add_argument(
        "--number", type=int, default=16, help="number of images: per data set, or in total for the loader"
    )
    parser.add_argument("--out", metavar="FILE", required=True, help="a contact sheet (.png) or a page (.html)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config options, which override those of FILE")
    args = parser.parse_intermixed_args(argv)
    if args.number < 1:
        parser.error(f"--number takes 1 or more, got {args.number}")
    return args


def show(args: argparse.Namespace) -> Path:
    """Write the pictures; returns the file.

    Raises:
        UserError: what is wrong with the config, a data set or ``--out``.
    """
    file = user_path(args.out)
    check_suffix(file)
    cfg = load_config(args.config_file, args.opts)
    if not cfg.DATASETS.TRAIN and (args.source == "loader" or not cfg.DATASETS.TEST):
        raise UserError("DATASETS.TRAIN is empty; name a data set to show")
    groups = annotated(cfg, args.number) if args.source == "annotations" else loaded(cfg, args.number)
    output_folder(file.parent)
    write_pictures(file, f"{args.config_file}: {args.source}", groups)
    print(f"{file}: {sum(len(group.pictures) for group in groups)} images")
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after a mistake in what the user gave."""
    try:
        show(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
