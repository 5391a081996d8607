"""Detect objects in images with a trained model, or classify them.

    domainnorm predict --weights RUN_OR_FILE --input PATH … --out DIR [--score NUMBER_OR_FILE]
        [--statistics population|minibatch] [--domain NAME|INDEX] [--batch-size N] [--exact] [--config-file F]
        [--opts KEY VALUE …]

Each PATH is an image, a folder (files are sorted by number, such as video frames) or a quoted pattern. A picture
of each image with its predictions goes to DIR, as does `predictions.json`, in COCO's results format.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..engine.streams import tolerant_streams
from ..errors import UserError
from ..output import output_folder, replace_file, write_json
from ..paths import user_path
from ..prediction import Prediction, Predictor
from . import Parser

PREDICTIONS, PICTURES = "predictions.json", "pictures"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of detectron2's demo, `--weights` for its `MODEL.WEIGHTS`."""
    parser = Parser(description="Detect objects in images with a trained model, or classify them.", allow_abbrev=False)
    parser.add_argument("--weights", metavar="RUN_OR_FILE", required=True, help="the folder of a run, or a checkpoint")
    parser.add_argument("--input", metavar="PATH", nargs="+", required=True, help="images, folders or patterns")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for pictures and predictions.json")
    parser.add_argument(
        "--score",
        metavar="NUMBER_OR_FILE",
        default="0.5",
        help="keep objects with a higher score, 0.5 by default; or a run's thresholds.json: the best of each class",
    )
    parser.add_argument(
        "--statistics", choices=("population", "minibatch"), default="population", help="which statistics normalize"
    )
    parser.add_argument("--domain", help="name or number of the domain, if data sets are the domains of norms")
    parser.add_argument("--batch-size", type=int, default=1, help="images read together; results do not depend on it")
    parser.add_argument("--exact", action="store_true", help="same results as in evaluation, to the bit; slower")
    parser.add_argument(
        "--config-file", metavar="FILE", help="config of the model, instead of the one in the checkpoint"
    )
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="options that override the config")
    return parser.parse_args(argv)


def predict(args: argparse.Namespace) -> int:
    """Predict, draw and write; returns how many inputs failed. For each a line says why.

    Raises:
        UserError: no predictions can be made, or what is found cannot be written.
    """
    predictor = Predictor(
        args.weights,
        statistics=args.statistics,
        domain=args.domain,
        score=_score(args.score),
        batch_size=args.batch_size,
        exact=args.exact,
        config_file=args.config_file,
        options=args.opts,
    )
    folder = output_folder(args.out, "--out")
    errors = 0

    def failed(error: UserError) -> None:
        nonlocal errors
        errors += 1
        _tell(error)

    results: list[dict[str, Any]] = []
    names: set[str] = set()  # of pictures
    for number, found in enumerate(predictor.stream(args.input, failed), start=1):
        _write_picture(found, output_folder(folder / PICTURES, "--out"), names)
        results += found.coco_results(number)
        print(found, flush=True)
    if names:
        write_json(folder / PREDICTIONS, results)
        print(f"{folder / PREDICTIONS}: {len(results)} predictions in {len(names)} images")
    return errors


def _score(text: str) -> float | dict[str, float]:
    """A number; or the best score of each class, from a file `thresholds.json`."""
    try:
        return float(text)
    except ValueError:
        file = user_path(text)
    try:
        best = json.loads(file.read_bytes())["bbox"]["classes"]
        return {name: score for name, score in best.items() if score is not None}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"--score takes a number from 0 to 1 or a run's thresholds.json, got {text!r}: {error}"
        ) from error


def _write_picture(found: Prediction, folder: Path, names: set[str]) -> None:
    """Under the name of the image or, where an earlier one has it too, with a number."""
    stem = Path(found.name).stem
    name = next(name for k in range(1, len(names) + 2) if (name := f"{stem}_{k}" if k > 1 else stem) not in names)
    names.add(name)
    with replace_file(folder / f"{name}.jpg", "wb") as stream:
        Image.fromarray(found.draw().permute(1, 2, 0).numpy()).save(stream, "jpeg", quality=90)


def _tell(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 after a mistake in what the user gave or a broken image, 130 after Ctrl-C."""
    logging.getLogger("domainnorm").setLevel(logging.WARNING)
    with tolerant_streams():
        try:
            return 2 if predict(parse(argv)) else 0
        except UserError as error:
            _tell(error)
            return 2
        except KeyboardInterrupt:
            return 130
