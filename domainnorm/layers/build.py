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
    """Build the norm layer called `name`, for `num_features` channels.

    The number of channel groups (of GN, SeqNorm and GBGN) is meant for a whole model: in a layer whose number of
    channels it does not divide, the greatest common divisor of both is used.

    Args:
        name: `""`: no norm. `"BN"`: `DomainBatchNorm` per process; `"SyncBN"`: over all ranks; `"FrozenBN"`,
            `"GhostBN"`, `"SeqNorm"`, `"BGN"`, `"GBGN"`, `"BRN"`: this library's layers; `"GN"`: `nn.GroupNorm`; `"IN"`:
            InstanceNorm, as a GroupNorm with one channel per group; `"PN"`: over the channels of each position. Class
            names are accepted too.
        num_features: number of channels, C.
        **options: of the layer, such as `num_domains`, `samples_per_group`, `eps`. `GN`, `IN` and `PN` have no running
            statistics and are the same for every domain: options for these are ignored. `BGN` also takes `split_space`.
            True (as in the paper): `num_groups` is used as it is, even if it splits channels in space; the layer then
            works at one feature size. False: the greatest common divisor of `num_groups` and the number of channels is
            used.

    Returns:
        The layer, or None for `""`.

    Raises:
        ValueError: unknown name, or options that the layer refuses.

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
    """The config name of a norm that is given by its config name or its class name.

    Raises:
        ValueError: unknown norm.
    """
    name = _CLASS_NAMES.get(name, name)
    if name not in LAYERS:
        raise ValueError(f"norm takes one of {['', *LAYERS]}, got {name!r}")
    return name


_CLASS_NAMES = {layer.__name__: name for name, layer in reversed(LAYERS.items())}


def is_norm(module: nn.Module) -> bool:
    """Whether the parameters of `module` itself are the γ and β of a normalization layer."""
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return isinstance(module, kinds)
