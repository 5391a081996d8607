"""Inference example weighing of the model of a config (*Four Things*, §3.1)."""

import copy
import logging
from collections.abc import Sequence
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from ..distributed import rank
from ..errors import UserError
from ..layers import DomainBatchNorm
from ..modeling import RetinaNet
from ..output import output_folder, write_json
from ..statistics.example_weight import choose_example_weight
from ..surgery.convert import convert_groupnorm
from .recompute import recompute
from .test_set import TestSet

logger = logging.getLogger(__name__)


def choose_weight(
    cfg: CfgNode, model: nn.Module, validation: TestSet | None, name: str, train_data: Sequence[Any] | None = None
) -> nn.Module | None:
    """`model`, set to population statistics, with the best of `TEST.EXAMPLE_WEIGHTS` on `validation`.

    The best by `TEST.EXAMPLE_WEIGHT_METRIC`: top-1 accuracy or box AP, unless it says another.

    A model with GroupNorms is copied, and the moving averages that they have not are computed by `TEST.RECOMPUTE`.
    Every rank calls it; the scores of all weights go to `OUTPUT_DIR/inference/<name>/example_weight.json`. None, with a
    warning, if the model has no norm.
    """
    if not any(isinstance(module, (DomainBatchNorm, nn.GroupNorm)) for module in model.modules()):
        logger.warning("TEST.EXAMPLE_WEIGHTS are without effect: the model has no norm")
        return None
    model = _with_statistics(cfg, model, train_data)
    weights = list(cfg.TEST.EXAMPLE_WEIGHTS)
    measured: list[dict[str, float]] = []  # of each weight all metrics

    def score(model: nn.Module) -> float:
        if validation is None:
            return 0.0  # there is one weight
        scores = validation.scores(model)
        measured.append(scores["classification"] if validation.classes else scores["bbox"])
        metric = cfg.TEST.EXAMPLE_WEIGHT_METRIC or ("top1" if validation.classes else "AP")
        if metric not in measured[-1]:
            raise UserError(f"TEST.EXAMPLE_WEIGHT_METRIC takes one of {list(measured[-1])}, got {metric!r}")
        return -measured[-1][metric] if metric == "loss" else measured[-1][metric]

    scores = choose_example_weight(model, score, weights)
    chosen = next(m.example_weight for m in model.modules() if isinstance(m, DomainBatchNorm))
    if rank() == 0:
        tried = {} if validation is None else {str(weight): value for weight, value in scores.items()}
        content = {"example_weight": chosen, "scores": tried, "data set": cfg.TEST.EXAMPLE_WEIGHT_DATASET}
        if measured:
            content["metrics"] = {str(weight): values for weight, values in zip(weights, measured, strict=True)}
        write_json(output_folder(cfg.OUTPUT_DIR) / "inference" / name / "example_weight.json", content)
    logger.info("%s: example weight %g of %s", name, chosen, weights)
    return model


def _with_statistics(cfg: CfgNode, model: nn.Module, train_data: Sequence[Any] | None) -> nn.Module:
    """The model itself or, with GroupNorms, a copy in which those have population statistics."""
    if not any(isinstance(module, nn.GroupNorm) for module in model.modules()):
        return model
    twin = copy.deepcopy(model)
    if isinstance(twin, RetinaNet):
        levels = twin.head.num_levels
        convert_groupnorm(twin.head, num_domains=levels, track_total_var=True)
        for layer in twin.head.modules():
            if isinstance(layer, DomainBatchNorm):
                layer.domains_per_name = levels
    convert_groupnorm(twin, track_total_var=True)
    recompute(cfg, twin, train_data)  # of the new layers only: the others are under population statistics
    return twin.eval()
