"""The name of a norm in a config -> a layer."""

import math
from typing import Any

from torch import nn

from .domain_batch_norm import DomainBatchNorm
from .frozen import FrozenBatchNorm


def get_norm(name: str, num_features: int, **options: Any) -> nn.Module | None:
    """The norm layer that `name` stands for in a config, over `num_features` channels.

    Args:
        name: `""`: None is returned. `"BN"`: `DomainBatchNorm` per process; `"SyncBN"`: over all ranks;
            `"FrozenBN"`: `FrozenBatchNorm`; `"GN"`: `nn.GroupNorm` of 32 groups, or of as many as divide both 32 and
            `num_features` and hold two channels or more (one channel of a 1 × 1 map has no variance).
        **options: of `DomainBatchNorm`, such as `num_domains`, `sgd_statistics`, `eps`. `GN` has no domains and no
            running statistics: it takes `eps` and is the same layer for every domain.
    """
    if name == "":
        return None
    if name == "BN":
        return DomainBatchNorm(num_features, **options)
    if name == "SyncBN":
        return DomainBatchNorm(num_features, sync=True, **options)
    if name == "FrozenBN":
        return FrozenBatchNorm(num_features, **options)
    if name == "GN":
        groups = math.gcd(32, num_features)
        groups = max(groups // 2, 1) if groups == num_features else groups
        return nn.GroupNorm(groups, num_features, eps=options.get("eps", 1e-5))
    raise ValueError(f"norm takes one of '', 'BN', 'SyncBN', 'GN', 'FrozenBN', got {name!r}")


def is_norm(module: nn.Module) -> bool:
    """Whether the parameters of `module` itself are the γ and β of a normalization."""
    kinds = (DomainBatchNorm, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return isinstance(module, kinds)
