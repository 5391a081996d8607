"""The switch to frozen statistics in the middle of training (*Rethinking "Batch"*, §4.3, Fig. 6)."""

from fvcore.common.config import CfgNode
from torch import nn

from ..errors import UserError
from ..layers import FrozenBatchNorm, freeze_batchnorm
from ..population import merge_population_statistics


def freeze_norm(cfg: CfgNode, model: nn.Module) -> None:
    """Make the layers of `SOLVER.FREEZE_NORM_LAYERS` FrozenBatchNorms, of statistics merged over the ranks.

    Raises:
        UserError: one of the names begins the name of no norm layer.
    """
    merge_population_statistics(model)
    solver = cfg.SOLVER
    freeze_batchnorm(model, solver.FREEZE_NORM_LAYERS or [""], train_affine=not solver.FREEZE_NORM_AFFINE)
    frozen = [name for name, module in model.named_modules() if isinstance(module, FrozenBatchNorm)]
    for beginning in solver.FREEZE_NORM_LAYERS or [""]:
        if not any(name.startswith(beginning) for name in frozen):
            raise UserError(
                f"SOLVER.FREEZE_NORM_LAYERS: no BatchNorm has a name that begins with {beginning!r}; the model has "
                f"{', '.join(name for name, _ in model.named_children())}"
            )
