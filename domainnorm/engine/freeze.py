"""The switch to frozen statistics in the middle of training (*Rethinking "Batch"*, §4.3, Fig. 6)."""

from fvcore.common.config import CfgNode
from torch import nn

from ..statistics.merge import merge_population_statistics
from ..surgery.freeze import freeze_batchnorm


def freeze_norm(cfg: CfgNode, model: nn.Module) -> None:
    """Make the layers of `SOLVER.FREEZE_NORM_LAYERS` FrozenBatchNorms, of statistics merged over the ranks."""
    merge_population_statistics(model)
    freeze_batchnorm(model, prefixes(cfg), train_affine=not cfg.SOLVER.FREEZE_NORM_AFFINE)


def prefixes(cfg: CfgNode) -> list[str]:
    """What the names of the layers to freeze begin with; "" stands for all layers."""
    return list(cfg.SOLVER.FREEZE_NORM_LAYERS) or [""]
