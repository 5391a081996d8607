"""The name of a norm -> a layer."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from .batch_group import BatchGroupNorm
from .batch_renorm import BatchRenorm
from .domain_batch_norm import DomainBatchNorm
from .frozen import FrozenBatchNorm
from .ghost import GhostBatchNorm
from .group_norm import GroupNorm, PositionalNorm
from .grouped import GroupedBatchNorm
from .seq_norm import SeqNorm

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "BN": DomainBatchNorm,
    "SyncBN": DomainBatchNorm,
    "GN": GroupNorm,
    "IN": GroupNorm,
    "PN": PositionalNorm,
    "FrozenBN": FrozenBatchNorm,
    "GhostBN": GhostBatchNorm,
    "SeqNorm": SeqNorm,
    "BGN": BatchGroupNorm,
    "GBGN": GroupedBatchNorm,
    "BRN": BatchRenorm,
}
OF_STATISTICS = {  # options that a norm of the sample alone has no use for
    *("num_domains", "sgd_statistics", "population_statistics", "momentum"),
    *("sync", "track_running_stats", "track_total_var"),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "SyncBN": {"sync": True},
    "GN": {"num_groups": 32},
    "GhostBN": {"samples_per_group": 16},
    "SeqNorm": {"num_channel_groups": 4, "num_sample_groups": 8},
    "BGN": {"num_groups": 16},
    "GBGN": {"num_channel_groups": 32, "samples_per_group": 2},
}


def get_norm(name: str, num_features: int, **options: Any) -> nn.Module | None:
    """The norm layer that `name` stands for, over `num_features` channels.

    Numbers of channel groups (of GN, SeqNorm and GBGN) are those a model is built with: in a layer whose channels they
    do not divide, their greatest common divisor with the channels is used.

    Args:
        name: `""`: there is no norm. `"BN"`: `DomainBatchNorm` per process; `"SyncBN"`: over all ranks;
            `"FrozenBN"`, `"GhostBN"`, `"SeqNorm"`, `"BGN"`, `"GBGN"`, `"BRN"`: this library's layers; `"GN"`:
            `nn.GroupNorm`; `"IN"`: with a channel a group, InstanceNorm; `"PN"`: over the channels of each place. The
            names of the classes are taken too.
        num_features: number of channels, C.
        **options: of the layer, such as `num_domains`, `samples_per_group`, `eps`. `GN`, `IN` and `PN` have no domains
            and no running statistics: they are the same layer for every domain, and do not take what is of these.
            `BGN` also takes `split_space`: True (the paper's): `num_groups` as it is, also where it splits channels in
            space; the layer then works at one feature size. False: its greatest common divisor with the channels.

    Returns:
        The layer, or None for `""`.

    Raises:
        ValueError: no such name, or options that the layer refuses.

    Example::

        >>> dn.get_norm("GhostBN", 16, samples_per_group=8)
        GhostBatchNorm(16, affine='shared', eps=1e-05, momentum=0.1, samples_per_group=8)
    """
    if name == "":
        return None
    name = norm_name(name)
    old_names = getattr(LAYERS[name], "_renamed", {})
    options = {
        key: value for key, value in _DEFAULTS.get(name, {}).items() if key not in map(old_names.get, options)
    } | options
    if name == "GhostBN" and (options.get("num_sample_groups") or options.get("num_groups")):
        options.pop("samples_per_group")
    exact = name == "BGN" and options.pop("split_space", True)
    for key in ("num_groups", "num_channel_groups", "channel_groups"):
        if key in options and name in ("GN", "SeqNorm", "BGN", "GBGN") and not exact:
            options[key] = math.gcd(options[key], num_features)
    if name in ("GN", "IN", "PN"):
        affine = options.pop("affine", "shared") not in (None, False)
        own = {key: value for key, value in options.items() if key not in OF_STATISTICS}
        if name == "PN":
            return PositionalNorm(num_features, affine=affine, **own)
        return GroupNorm(own.pop("num_groups", num_features), num_features, affine=affine, **own)
    return LAYERS[name](num_features, **options)


def norm_name(name: str) -> str:
    """The name in a config of a norm that may be called by its class.

    Raises:
        ValueError: no such norm.
    """
    name = _CLASS_NAMES.get(name, name)
    if name not in LAYERS:
        raise ValueError(f"norm takes one of {['', *LAYERS]}, got {name!r}")
    return name


_CLASS_NAMES = {layer.__name__: name for name, layer in reversed(LAYERS.items())}


def is_norm(module: nn.Module) -> bool:
    """Whether the parameters of `module` itself are the γ and β of a normalization."""
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return isinstance(module, kinds)
