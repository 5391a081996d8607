"""Averages of the weights along the way of training, with population statistics of their own."""

from collections.abc import Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ..config import iteration_of
from ..evaluation import recompute


class WeightAverage:
    """torch's `AveragedModel`, by `SOLVER.AVERAGE_WEIGHTS`; every rank has the same.

    Running statistics are not averaged: those of other weights are not those of the average (*Rethinking "Batch"*,
    §3.3). They are recomputed for it.

    Args:
        train_data: what they are recomputed on; None: the training sets of the config.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, train_data: Sequence[Any] | None = None) -> None:
        self.train_data = train_data
        solver = cfg.SOLVER
        ema = solver.AVERAGE_WEIGHTS == "EMA"
        average = get_ema_multi_avg_fn(solver.AVERAGE_WEIGHTS_DECAY) if ema else get_swa_multi_avg_fn()
        self.average = AveragedModel(model, multi_avg_fn=average)
        self.begin = iteration_of(cfg, solver.AVERAGE_WEIGHTS_FROM)

    def update(self, model: nn.Module, iteration: int) -> None:
        """After step `iteration`, counted from 0."""
        if iteration >= self.begin:
            self.average.update_parameters(model)

    def model(self, cfg: CfgNode, trained: nn.Module) -> nn.Module:
        """The averaged model with statistics recomputed by `TEST.RECOMPUTE`; before it began, the `trained` one.

        Layers that the batches do not reach have the statistics of the `trained` model. Every rank calls it.
        """
        if not self.average.n_averaged:
            return trained
        module = self.average.module.train(trained.training)
        with torch.no_grad():
            for own, other in zip(module.buffers(), trained.buffers(), strict=True):
                own.copy_(other)
        recompute(cfg, module, self.train_data)
        return module
