from .build import get_norm, is_norm
from .domain_batch_norm import DomainBatchNorm, normalize_in_step
from .frozen import FrozenBatchNorm, freeze_batchnorm
from .sequential import DomainSequential

__all__ = [
    "DomainBatchNorm",
    "DomainSequential",
    "FrozenBatchNorm",
    "freeze_batchnorm",
    "get_norm",
    "is_norm",
    "normalize_in_step",
]
