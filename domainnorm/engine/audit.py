"""The audit of a config's model in the flow of its training: on its data sets, or on the images of a step."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from ..auditing import Finding, Report, audit
from ..auditing.checks import CHEAP
from ..auditing.finding import counted
from ..auditing.text import figure, site_names
from ..config import iteration_of
from ..data import train_loader, training_sets
from ..data.classes import with_classes
from ..data.sampler import images_per_forward
from ..distributed import gather_objects, get_device, rank, to_device, world_size
from ..errors import UserError
from ..evaluation.classification import whole_minibatches
from ..evaluation.test_set import TestSet
from ..layers import DomainBatchNorm
from ..modeling.checkpoint_file import read_checkpoint
from ..modeling.mask_rcnn import GeneralizedRCNN
from ..modeling.retinanet import RetinaNet
from ..paths import user_path
from ..statistics.merge import merge_population_statistics
from ..statistics.preserve import preserve_state
from ..surgery.domains import use_domains_of
from .freeze import freeze_norm
from .log import TrainingLog
from .optim import build_optimizer

logger = logging.getLogger(__name__)
FIGURES = {  # of the record of a training: a figure of the layers, and which is the worst
    "divergence": ("inference", max),
    "drift": ("drift", max),
    "samples": ("samples", min),
    "rounded": ("rounded", max),
    "dead_channels": ("dead_channels", max),
    "initial_weight": ("initial_weight", max),
}


def audit_batches(cfg: CfgNode, model: nn.Module, batches: Iterable[Any], **options: Any) -> Report:
    """`dn.audit` of `model` as it trains, on batches `(images, targets)` of one forward pass each.

    Inference is all images of a batch in one pass, in the size that they are trained at: what differs from training are
    the statistics alone.
    """
    device, amp = get_device(cfg.MODEL.DEVICE), cfg.SOLVER.AMP

    def forward(model: nn.Module, batch: Any) -> Any:
        images, targets = to_device(batch, device)
        use_domains_of(model, targets)
        if isinstance(model, (RetinaNet, GeneralizedRCNN)):
            model.transform.train()
        # torchvision's forward: ours takes images one by one
        if isinstance(model, RetinaNet):
            model.head.training = True  # else each image would be its own normalization batch there
            return super(RetinaNet, model).forward(images)
        if isinstance(model, GeneralizedRCNN):
            return super(GeneralizedRCNN, model).forward(images)
        with whole_minibatches(model):
            return model(images)

    def loss(model: nn.Module, batch: Any) -> Any:
        with torch.autocast(device.type, dtype=getattr(torch, amp.DTYPE), enabled=amp.ENABLED):
            return model(*to_device(batch, device))

    return audit(model, batches, forward=forward, loss=loss, accumulate=cfg.SOLVER.ACCUMULATE, **options)


def audit_config(cfg: CfgNode, model: nn.Module, number: int, *, with_score: bool = False, **options: Any) -> Report:
    """`dn.audit` on `number` images or a few more of the training sets, in batches as a process of training had them.

    Args:
        cfg: whose MODEL.WEIGHTS the model has.
        model: from `build_model`; norms that training had frozen by then become so.
        with_score: AP or top1 on `DATASETS.TEST` is the score of remedies.

    Raises:
        UserError: no training set, or one that cannot be read.
    """
    if own := getattr(model, "description", {}).get("class_names"):
        cfg = with_classes(cfg, own)
    file = user_path(cfg.MODEL.WEIGHTS)
    saved = read_checkpoint(file) if file.is_file() else {}
    frozen_at = iteration_of(cfg, cfg.SOLVER.FREEZE_NORM_AT)
    if 0 < frozen_at < saved.get("iteration", 0):
        freeze_norm(cfg, model)
    ranks = saved.get("ranks")
    processes = len(ranks) if isinstance(ranks, list) and not _is_synchronized(model) else 1
    batches = _TrainingBatches(cfg, number, processes)
    if with_score:
        options["score"] = _score(cfg)
    return audit_batches(cfg, model.train(), batches, optimizer=build_optimizer(cfg, model), **options)


class _TrainingBatches:
    """Batches of the training sets, the same ones each time; virtual images are included."""

    def __init__(self, cfg: CfgNode, number: int, processes: int) -> None:
        self.cfg = cfg.clone()
        self.cfg.defrost()
        solver = self.cfg.SOLVER
        size = max(images_per_forward(cfg, processes), 1)
        solver.IMS_PER_BATCH, solver.ACCUMULATE, solver.VIRTUAL_BATCH = size, 1, 0
        self.datasets = training_sets(self.cfg)
        self.number = math.ceil(number / size)

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Any]:
        with closing(train_loader(self.cfg, rank=0, world_size=1, datasets=self.datasets)) as batches:
            yield from itertools.islice(batches, self.number)


def _is_synchronized(model: nn.Module) -> bool:
    kinds = (DomainBatchNorm, nn.SyncBatchNorm)
    return any(getattr(m, "sync", True) for m in model.modules() if isinstance(m, kinds))


def _score(cfg: CfgNode) -> Callable[[nn.Module], float]:
    """The mean of AP, or top1, over the test sets."""
    if not cfg.DATASETS.TEST:
        raise UserError("--score: DATASETS.TEST is empty: name a data set to evaluate on")
    tests = [TestSet(cfg, name) for name in cfg.DATASETS.TEST]

    def score(model: nn.Module) -> float:
        kinds = [next(iter(test.scores(model.eval()).values())) for test in tests]
        return sum(next(iter(metrics.values())) for metrics in kinds) / len(kinds)

    return score


class TrainingAudit:
    """The cheap checks, on the images of a step; training goes on as if they had not been. Every rank calls it.

    What is found is told once, the figures go to `metrics.json` and TensorBoard, the worst of all ranks.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer, log: TrainingLog) -> None:
        self.cfg, self.model, self.optimizer, self.log = cfg, model, optimizer, log
        self.told: set[tuple[str, str]] = set()

    def __call__(self, done: int, images: list[Any], targets: list[Any]) -> None:
        """After `done` steps, on what this rank had in the last one."""
        size = images_per_forward(self.cfg, world_size())
        starts = range(0, len(images), size)
        batches = [(images[start : start + size], targets[start : start + size]) for start in starts]
        with preserve_state(self.model):
            merge_population_statistics(self.model)  # as inference has them
            options: dict[str, Any] = {"optimizer": self.optimizer, "checks": CHEAP, "progress": False}
            report = audit_batches(self.cfg, self.model, batches, **options)
        ranks = gather_objects((report.counts, _worst(report), [f for f in report.findings if f.level != "note"]))
        if rank() == 0:
            self._write(done, *zip(*ranks, strict=True))

    def _write(self, done: int, counts: Any, figures: Any, findings: Iterable[list[Finding]]) -> None:
        found = {f"audit/{level}s": float(max(c[level] for c in counts)) for level in ("error", "warning")}
        said = ["audit", *(counted(int(found[f"audit/{level}s"]), level) for level in ("error", "warning"))]
        for name, (_, worst) in FIGURES.items():
            if known := [own[name] for own in figures if name in own]:
                value, place = worst(known, key=lambda item: item[0])
                found[f"audit/{name}"] = value
                said.append(f"{name} {figure(value)} ({place})")
        self.log.write(done, found, "  ".join(said))
        for finding in (f for own in findings for f in own):
            if (finding.check, finding.kind) not in self.told:
                self.told.add((finding.check, finding.kind))
                logger.warning("audit: %s: %s Repair: %s", finding.level, finding.message, finding.remedy)


def _worst(report: Report) -> dict[str, tuple[float, str]]:
    """The worst value of each figure, and where."""
    rows = [row for row in zip(report.layers, site_names(report.layers), strict=True) if not row[0]["frozen"]]
    found = {}
    for name, (key, worst) in FIGURES.items():
        values = [(row[key], place) for row, place in rows if row[key] is not None and math.isfinite(row[key])]
        if values:
            found[name] = worst(values, key=lambda item: item[0])
    return found
