from .batch_group import BatchGroupNorm
from .batch_renorm import BatchRenorm
from .build import LAYERS, get_norm, is_norm, norm_name
from .domain_batch_norm import DomainBatchNorm
from .frozen import FrozenBatchNorm
from .ghost import GhostBatchNorm
from .grouped import GroupedBatchNorm
from .normalize_layers import normalize_layers
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
    "get_norm",
    "is_norm",
    "norm_name",
    "normalize_layers",
]
