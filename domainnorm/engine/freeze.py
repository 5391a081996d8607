"""The switch to frozen statistics in the middle of training (*Rethinking "Batch"*, §4.3, Fig. 6)."""

from fvcore.common.config import CfgNode
from torch import nn

from ..errors import UserError
from ..layers import DomainBatchNorm, freeze_batchnorm
from ..population import merge_population_statistics


def check_freeze(cfg: CfgNode, model: nn.Module) -> None:
    """Refuse what `freeze_norm` would find nothing for, before training begins.

    Raises:
        UserError: `SOLVER.FREEZE_NORM_AT` is set, and one of `FREEZE_NORM_LAYERS` begins the name of no BatchNorm.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, DomainBatchNorm)]
    for beginning in _beginnings(cfg) if cfg.SOLVER.FREEZE_NORM_AT else ():
        if not any(name.startswith(beginning) for name in names):
            parts = ", ".join(name for name, _ in model.named_children())
            raise UserError(
                f"SOLVER.FREEZE_NORM_LAYERS: no BatchNorm has a name that begins with {beginning!r}; "
                f"the model has {parts}"
            )


def freeze_norm(cfg: CfgNode, model: nn.Module) -> None:
    """Make the layers of `SOLVER.FREEZE_NORM_LAYERS` FrozenBatchNorms, of statistics merged over the ranks."""
    merge_population_statistics(model)
    freeze_batchnorm(model, _beginnings(cfg), train_affine=not cfg.SOLVER.FREEZE_NORM_AFFINE)


def _beginnings(cfg: CfgNode) -> list[str]:
    return list(cfg.SOLVER.FREEZE_NORM_LAYERS) or [""]
