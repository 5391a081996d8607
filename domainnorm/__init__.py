"""domainnorm: the batch of BatchNorm as an explicit choice."""

from .config import UserError, load_config
from .convert import set_statistics
from .engine import train
from .evaluation import evaluate
from .layers import DomainBatchNorm, DomainSequential, FrozenBatchNorm, get_norm
from .modeling import build_model
from .moments import Moments

__all__ = [
    "DomainBatchNorm",
    "DomainSequential",
    "FrozenBatchNorm",
    "Moments",
    "UserError",
    "build_model",
    "evaluate",
    "get_norm",
    "load_config",
    "set_statistics",
    "train",
]
