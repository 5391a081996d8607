"""Population statistics of a model, recomputed on a data set of the config."""

import logging
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from ..data import one_set_loader, train_loader
from ..distributed import get_device, rank, to_device, world_size
from ..errors import UserError
from ..layers import DomainBatchNorm
from ..statistics.recompute import recompute_population_statistics

logger = logging.getLogger(__name__)


def recompute(cfg: CfgNode, model: nn.Module, train_data: Sequence[Any] | None = None) -> None:
    """Replace the running statistics of `model`, by `cfg.TEST.RECOMPUTE`. Every rank calls it.

    On batches of `BATCH_SIZE` images (or as large as in training; resized and flipped as there) of `DATASET` or else of
    the training sets.
    Random states are put back: training goes on as if it had not been.

    Args:
        train_data: instead of the training sets of the config.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if all(isinstance(m, DomainBatchNorm) and m.frozen for m in norms):
        logger.warning("nothing to recompute: no norm of the model follows its batches")
        return
    options = cfg.TEST.RECOMPUTE
    cfg = cfg.clone()
    cfg.defrost()
    solver = cfg.SOLVER
    solver.IMS_PER_BATCH, solver.ACCUMULATE, solver.VIRTUAL_BATCH = batch_size(cfg), 1, 0
    ranks: dict[str, Any] = {"rank": rank(), "world_size": world_size()}
    if options.DATASET:
        loader = one_set_loader(cfg, options.DATASET, **ranks)
    else:
        loader = train_loader(cfg, **ranks, datasets=train_data)
    device = get_device(cfg.MODEL.DEVICE)
    step = _Step(model, device)
    step.training = model.training  # of its parts, each keeps its own
    with (
        closing(loader) as batches,
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        recompute_population_statistics(
            step, batches, options.NUM_SAMPLES, options.METHOD, keep_groups=options.KEEP_GROUPS
        )


def batch_size(cfg: CfgNode) -> int:
    """The number of images in a batch of the recomputation, over all processes.

    Raises:
        UserError: the processes cannot share it equally.
    """
    solver = cfg.SOLVER
    of_training = solver.IMS_PER_BATCH // solver.ACCUMULATE + world_size() * solver.VIRTUAL_BATCH
    size = cfg.TEST.RECOMPUTE.BATCH_SIZE or of_training
    if size % world_size():
        raise UserError(f"TEST.RECOMPUTE.BATCH_SIZE {size} cannot be shared equally by {world_size()} processes")
    return size


class _Step(nn.Module):
    """A model as a function of one batch `(images, targets)`."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.device = device

    def forward(self, batch: tuple[list[Tensor], list[dict[str, Any]]]) -> Any:
        return self.model(*to_device(batch, self.device))
