from .batch_group import BatchGroupNorm
from .batch_renorm import BatchRenorm
from .build import LAYERS, get_norm, is_norm, norm_name
from .domain_batch_norm import DomainBatchNorm
from .frozen import FrozenBatchNorm, freeze_batchnorm
from .ghost import GhostBatchNorm
from .grouped import GroupedBatchNorm
from .in_step import normalize_in_step
from .seq_norm import SeqNorm
from .sequential import DomainSequential

__all__ = [
    "LAYERS",
    "BatchGroupNorm",
    "BatchRenorm",
    "DomainBatchNorm",
    "DomainSequential",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "GroupedBatchNorm",
    "SeqNorm",
    "freeze_batchnorm",
    "get_norm",
    "is_norm",
    "norm_name",
    "normalize_in_step",
]
