"""Time that a Predictor takes per image, against the model that an evaluation runs and torchvision's.

R50-FPN detectors with random weights, as in `model`, under population statistics. `exact` is the model of
`dn.evaluate`; `fast` is what a Predictor makes of it, in float32 and in bfloat16. Random weights find little, so boxes
of all scores are kept. The difference is the largest relative one among the twenty best scores.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from domainnorm.modeling.fast import FastModel, computes_in_bfloat16

from .model import DETECTORS, batch, build
from .table import Row
from .timing import milliseconds, ratio, times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, nargs=2, default=[256, 320], help="height and width of the images")
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS))
    parser.add_argument("--repeats", type=int, default=7, help="number of ratios, of which the median is taken")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])


def measure(args: argparse.Namespace) -> Iterator[Row]:
    native = computes_in_bfloat16(torch.device(args.device))
    for detector in args.detectors:
        models = build(detector, *args.size, device=args.device)
        images, _ = batch(1, *args.size, device=args.device)
        exact = models["ours"].eval()
        ways = {
            "exact": exact,
            "torchvision": models["theirs"].eval(),
            "float32": FastModel(exact),
            "bfloat16": FastModel(exact, bfloat16=True),
        }
        for model in ways.values():
            inner = getattr(model, "model", model)
            getattr(inner, "roi_heads", inner).score_thresh = 0.0
        runs = {name: partial(infer, model, images) for name, model in ways.items()}
        scores = {name: run() for name, run in runs.items()}
        taken = times(runs, args.repeats, device=args.device)
        for name in ("float32", "bfloat16"):
            best, own = scores["exact"][:20], scores[name][:20]
            yield {
                "detector": detector,
                "size": "x".join(map(str, args.size)),
                "fast, in": name,
                "instructions for bfloat16": "yes" if native else "no",
                "time / evaluate's": ratio(taken, name, "exact"),
                "time / torchvision's": ratio(taken, name, "torchvision"),
                "ms": milliseconds(taken, name),
                "ms, evaluate's": milliseconds(taken, "exact"),
                "relative difference": ((own - best).abs() / best).max().item(),
            }


@torch.no_grad()
def infer(model: torch.nn.Module, images: list[Tensor]) -> Tensor:
    """The scores in the first image, the best first."""
    return model(images)[0]["scores"]
