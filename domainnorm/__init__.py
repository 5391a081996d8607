"""domainnorm: the batch of BatchNorm as an explicit choice."""

from .config import load_config
from .convert import set_statistics
from .engine import train
from .errors import UserError
from .evaluation import evaluate
from .fuse import fuse
from .layers import DomainBatchNorm, DomainSequential, FrozenBatchNorm, get_norm
from .modeling import build_model
from .moments import Moments
from .population import merge_population_statistics, recompute_population_statistics
from .roi_shuffle import RoIShuffle
from .virtual_batch import virtual_batch

__all__ = [
    "DomainBatchNorm",
    "DomainSequential",
    "FrozenBatchNorm",
    "Moments",
    "RoIShuffle",
    "UserError",
    "build_model",
    "evaluate",
    "fuse",
    "get_norm",
    "load_config",
    "merge_population_statistics",
    "recompute_population_statistics",
    "set_statistics",
    "train",
    "virtual_batch",
]
