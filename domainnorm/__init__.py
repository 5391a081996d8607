"""domainnorm: the batch of BatchNorm as an explicit choice."""

from .config import load_config
from .convert import convert_batchnorm, convert_groupnorm, set_statistics
from .domains import add_domain, keep_domain, merge_domains, name_domains, nearest_domain, use_domain
from .engine import train
from .errors import UserError
from .evaluation import evaluate
from .example_weight import choose_example_weight, set_example_weight
from .export import export_model
from .fuse import fuse
from .layers import (
    BatchGroupNorm,
    BatchRenorm,
    DomainBatchNorm,
    DomainSequential,
    FrozenBatchNorm,
    GhostBatchNorm,
    GroupedBatchNorm,
    SeqNorm,
    get_norm,
)
from .modeling import build_model
from .moments import Moments
from .population import merge_population_statistics, recompute_population_statistics
from .roi_shuffle import RoIShuffle
from .virtual_batch import virtual_batch

__all__ = [
    "BatchGroupNorm",
    "BatchRenorm",
    "DomainBatchNorm",
    "DomainSequential",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "GroupedBatchNorm",
    "Moments",
    "RoIShuffle",
    "SeqNorm",
    "UserError",
    "add_domain",
    "build_model",
    "choose_example_weight",
    "convert_batchnorm",
    "convert_groupnorm",
    "evaluate",
    "export_model",
    "fuse",
    "get_norm",
    "keep_domain",
    "load_config",
    "merge_domains",
    "merge_population_statistics",
    "name_domains",
    "nearest_domain",
    "recompute_population_statistics",
    "set_example_weight",
    "set_statistics",
    "train",
    "use_domain",
    "virtual_batch",
]
