#!/usr/bin/env python
"""How many AP a fault costs a detector, what `dn.audit` names first, and how many AP its remedy brings back.

    tools/studies/audit_cost.py FAULT RUN [--sound ROW] [--repaired ROW] [--seed 0] --out FOLDER

The fault is planted in the model of a training RUN, or was part of its training ("as_trained"). AP is under population
statistics. The remedy is that of the first finding, whatever was planted. If it is another training, it is one that a
study has done: `--repaired table6/shuffle`. `--sound` names the training of the model without the fault, by default RUN
itself.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

import domainnorm as dn
from domainnorm.data import test_loader, train_loader
from domainnorm.engine.audit import audit_config
from domainnorm.evaluation import recompute
from domainnorm.layers import DomainBatchNorm
from domainnorm.modeling.checkpoint_file import read_checkpoint
from domainnorm.output import output_folder, write_json
from domainnorm.prediction.predictor import config_of

IMAGES = 64  # that are audited
RECOMPUTED = 256  # images of which statistics are recomputed
NIGHT = {"TRAIN": ["shapes_night_train"], "TEST": ["shapes_night_val"]}  # another domain


@dataclass
class Case:
    """A model and the config that it is used with.

    Attributes:
        model: the detector.
        cfg: of its images, and of those that it is audited on.
        weights: its checkpoint; the others of the run lie beside it.
    """

    model: nn.Module
    cfg: CfgNode
    weights: Path

    def norms(self, prefix: str = "") -> Iterator[DomainBatchNorm]:
        """Those whose names begin so."""
        for name, module in self.model.named_modules():
            if isinstance(module, DomainBatchNorm) and name.startswith(prefix):
                yield module

    def recompute(self, **data_sets: list[str]) -> None:
        """Population statistics, of training images or of other ones."""
        cfg = self.cfg.clone()
        cfg.DATASETS.update(data_sets)
        cfg.TEST.RECOMPUTE.NUM_SAMPLES = RECOMPUTED
        recompute(cfg, self.model)

    def ap(self) -> float:
        with torch.no_grad():
            return dn.evaluate(self.cfg, self.model.eval(), "population")["population"]["bbox"]["AP"]


def as_trained(case: Case) -> None:
    """What is wrong was so in training; or nothing is."""


def never_updated(case: Case) -> None:
    """Mean 0, variance 1."""
    for norm in case.norms():
        norm.reset_running_stats()


def frozen_initial(case: Case) -> None:
    """The same of a backbone that is frozen."""
    for norm in case.norms("backbone"):
        norm.reset_running_stats()
        norm.frozen = True
        norm.requires_grad_(False)


def small_momentum(case: Case) -> None:
    """What a momentum of 0.001 leaves of mean 0 and variance 1 after the steps of the training."""
    for norm in case.norms():
        assert norm.running_mean is not None and norm.running_var is not None
        norm.momentum = 0.001
        left = (1 - norm.momentum) ** case.cfg.SOLVER.MAX_ITER
        norm.running_mean.mul_(1 - left)
        norm.running_var.mul_(1 - left).add_(left)


def few_updates(case: Case) -> None:
    """Ten updates from mean 0 and variance 1."""
    never_updated(case)
    _update(case, case.cfg.SOLVER.IMS_PER_BATCH, 10)


def last_batch(case: Case) -> None:
    """The statistics of one batch: a momentum of 1."""
    for norm in case.norms():
        norm.momentum = 1.0
    _update(case, case.cfg.SOLVER.IMS_PER_BATCH, 1)


def left_in_training(case: Case) -> None:
    """Norms in training mode while single images are predicted, which move the average; 40 of those that can be."""
    case.model.eval()
    for norm in case.norms():
        norm.train()
    loader = test_loader(case.cfg, case.cfg.DATASETS.TEST[0], rank=0, world_size=1)
    # a square image has one value a channel in the last level, which BatchNorm refuses
    wide = (images for images, _ in loader if images[0].shape[1] != images[0].shape[2])
    for images in _first(wide, 40):
        case.model(images)


def other_statistics(case: Case) -> None:
    """Statistics of dark images."""
    case.recompute(**NIGHT)


def other_images(case: Case) -> None:
    """The model is used on dark images."""
    case.cfg.DATASETS.update(NIGHT)


def one_layer(case: Case) -> None:
    """The variances of one layer of the head ten times what they are."""
    norm = list(case.norms("head"))[-1]
    norm.running_var.mul_(10)  # type: ignore[union-attr]


def zero_variance(case: Case) -> None:
    """Variances of 0 in one of sixteen channels of a layer of the backbone."""
    norm = list(case.norms("backbone"))[5]
    norm.running_var[..., ::16] = 0  # type: ignore[index]


def nan(case: Case) -> None:
    """In one channel of one layer."""
    norm = list(case.norms("backbone"))[5]
    norm.running_mean[..., 0] = float("nan")  # type: ignore[index]


def half(case: Case) -> None:
    """Rounded, as by a checkpoint in float16: buffers that stay so are refused by the layers."""
    for norm in case.norms():
        for buffer in (norm.running_mean, norm.running_var):
            buffer.copy_(buffer.half())  # type: ignore[union-attr]


def large_eps(case: Case) -> None:
    """0.001, which other frameworks have, for the 1e-5 of the training."""
    for norm in case.norms():
        norm.eps = 0.001


def averaged(case: Case) -> None:
    """The weights are averages of the checkpoints of the second half, the statistics those of the last."""
    files = [*sorted(case.weights.parent.glob("model_0*.pth")), case.weights]
    if len(files) < 2:
        raise dn.UserError(
            f"{case.weights.parent} has no checkpoints but the last, and an average needs several: train it again"
        )
    states = [read_checkpoint(file)["model"] for file in files]
    with torch.no_grad():
        for name, parameter in case.model.named_parameters():
            parameter.copy_(torch.stack([state[name] for state in states]).mean(0))


def padding(case: Case) -> None:
    """Statistics of batches of images of many sizes."""
    case.cfg.INPUT.MIN_SIZE_TRAIN, case.cfg.INPUT.MAX_SIZE_TRAIN = [64, 128, 192], 240
    case.recompute()


def raw_pixels(case: Case) -> None:
    """Neither centered nor scaled as in training."""
    transform: Any = case.model.transform
    transform.image_mean, transform.image_std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]


def _update(case: Case, size: int, steps: int) -> None:
    """Forward passes in training mode."""
    case.model.train()
    for images, targets in _first(train_loader(case.cfg, rank=0, world_size=1), steps):
        case.model(images[:size], targets[:size])


def _first(loader: Any, number: int) -> Iterator[Any]:
    for _, batch in zip(range(number), loader, strict=False):
        yield batch


FAULTS: dict[str, Callable[[Case], None]] = {
    function.__name__: function
    for function in (
        *(as_trained, never_updated, frozen_initial, small_momentum, few_updates, last_batch, left_in_training),
        *(other_statistics, other_images, one_layer, zero_variance, nan, half, large_eps, averaged, padding),
        raw_pixels,
    )
}


def recomputed(case: Case) -> None:
    for norm in case.norms():
        norm.frozen = False
    case.recompute()


def per_level(case: Case) -> None:
    for norm in case.norms("head"):
        norm.population_statistics = "per_domain"
        for name, buffer in list(norm.named_buffers(recurse=False)):
            setattr(norm, name, buffer.expand(norm.num_domains, *buffer.shape).clone())
    case.recompute()


def shared(case: Case) -> None:
    for norm in case.norms("head"):
        norm.population_statistics = "shared"
        for name, buffer in list(norm.named_buffers(recurse=False)):
            setattr(norm, name, buffer[0].clone())
    case.recompute()


def smaller_eps(case: Case) -> None:
    for norm in case.norms():
        norm.eps = 1e-5


def no_padding(case: Case) -> None:
    """Statistics of images in the sizes of the training, each batch of one shape."""
    own = config_of(case.weights, None, ()).INPUT
    case.cfg.INPUT.MIN_SIZE_TRAIN, case.cfg.INPUT.MAX_SIZE_TRAIN = own.MIN_SIZE_TRAIN, own.MAX_SIZE_TRAIN
    size = case.cfg.SOLVER.IMS_PER_BATCH
    shapes: dict[Any, list[Any]] = {}
    for batch in _first(train_loader(case.cfg, rank=0, world_size=1), RECOMPUTED // size):
        for image, target in zip(*batch, strict=True):
            shapes.setdefault(image.shape, []).append((image, target))
    batches = [alike[k : k + size] for alike in shapes.values() for k in range(0, len(alike) - size + 1, size)]
    dn.recompute_population_statistics(_Training(case.model), batches, progress=False)


class _Training(nn.Module):
    """A detector as a function of pairs of image and target."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: list[Any]) -> Any:
        images, targets = zip(*batch, strict=True)
        return self.model(list(images), list(targets))


REMEDIES: dict[str, Callable[[Case], None]] = {  # of what needs no training
    "frozen: never updated": recomputed,
    "frozen: unfinished average": recomputed,
    "drift: statistics lag": recomputed,
    "drift: frozen statistics do not fit": recomputed,
    "domains: far from all": recomputed,
    "training: averaged weights": recomputed,
    "consistency: train/test inconsistency": recomputed,
    "numerics: broken statistics": recomputed,
    "numerics: dead channels": smaller_eps,
    "calls: shared statistics": per_level,
    "calls: shared batches": shared,
    "padding: padding counts": no_padding,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("run", type=Path, help="folder of the training, WORK/STUDY/ROW/seed-SEED")
    parser.add_argument("--sound", metavar="STUDY/ROW", help="the row of the model without the fault")
    parser.add_argument("--repaired", metavar="STUDY/ROW", help="the row that was trained with the remedy")
    parser.add_argument("--leak", action="store_true", help="also audit the leak between samples of a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    def trained(row: str | None) -> float:
        folder = args.run if row is None else args.run.parents[2] / row / f"seed-{args.seed}"
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))["population"]["bbox"]["AP"]

    out = output_folder(args.out, "--out")
    weights = args.run / "model_final.pth"
    cfg = config_of(weights, None, ["OUTPUT_DIR", str(out / "evaluation")])
    cfg.defrost()
    case = Case(dn.build_model(cfg, trained=True), cfg, weights)
    found = {"sound": trained(args.sound)}
    with torch.no_grad():
        FAULTS[args.fault](case)
    found["before"] = case.ap()
    report = audit_config(case.cfg, case.model, IMAGES, leak=args.leak)
    print(report)
    findings = [f"{f.level}: {f.check}: {f.kind}" for f in report.findings]
    found["named"] = findings[0] if findings else "nothing"
    found["findings"] = findings
    found["remedy"] = report.findings[0].remedy if findings else ""
    if args.repaired:
        found["after"] = trained(args.repaired)
    elif findings and (remedy := REMEDIES.get(findings[0].partition(": ")[2])) is not None:
        remedy(case)
        found["after"] = case.ap()
    else:
        found["after"] = found["before"]
    write_json(out / "results.json", found)


if __name__ == "__main__":
    try:
        main()
    except dn.UserError as error:
        sys.exit(f"error: {error}")
