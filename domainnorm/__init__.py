"""domainnorm: the batch of BatchNorm as an explicit choice."""

from .config import UserError, load_config
from .convert import set_statistics
from .layers import DomainBatchNorm, DomainSequential, FrozenBatchNorm, get_norm
from .moments import Moments

__all__ = [
    "DomainBatchNorm",
    "DomainSequential",
    "FrozenBatchNorm",
    "Moments",
    "UserError",
    "get_norm",
    "load_config",
    "set_statistics",
]
