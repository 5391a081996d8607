"""domainnorm: the batch of BatchNorm as an explicit choice.

The public names are loaded when they are first used: the layers need torch alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .auditing import audit as audit
    from .config import load_config as load_config
    from .distributed.roi_shuffle import RoIShuffle as RoIShuffle
    from .engine import (
        HookBase as HookBase,
    )
    from .engine import (
        train as train,
    )
    from .errors import UserError as UserError
    from .evaluation import evaluate as evaluate
    from .layers import (
        BatchGroupNorm as BatchGroupNorm,
    )
    from .layers import (
        BatchRenorm as BatchRenorm,
    )
    from .layers import (
        DomainBatchNorm as DomainBatchNorm,
    )
    from .layers import (
        DomainSequential as DomainSequential,
    )
    from .layers import (
        FrozenBatchNorm as FrozenBatchNorm,
    )
    from .layers import (
        GhostBatchNorm as GhostBatchNorm,
    )
    from .layers import (
        GroupedBatchNorm as GroupedBatchNorm,
    )
    from .layers import (
        SeqNorm as SeqNorm,
    )
    from .layers import (
        get_norm as get_norm,
    )
    from .modeling import build_model as build_model
    from .ops.moments import Moments as Moments
    from .ops.select import backends as backends
    from .prediction import Predictor as Predictor
    from .statistics.choose import set_statistics as set_statistics
    from .statistics.example_weight import choose_example_weight as choose_example_weight
    from .statistics.example_weight import set_example_weight as set_example_weight
    from .statistics.merge import merge_population_statistics as merge_population_statistics
    from .statistics.recompute import recompute_population_statistics as recompute_population_statistics
    from .statistics.virtual_batch import virtual_batch as virtual_batch
    from .surgery.convert import convert_batchnorm as convert_batchnorm
    from .surgery.convert import convert_groupnorm as convert_groupnorm
    from .surgery.domains import name_domains as name_domains
    from .surgery.domains import use_domain as use_domain
    from .surgery.export import export_model as export_model
    from .surgery.freeze import freeze_batchnorm as freeze_batchnorm
    from .surgery.fuse import fuse as fuse
    from .surgery.nearest import nearest_domain as nearest_domain
    from .surgery.resize_domains import add_domain as add_domain
    from .surgery.resize_domains import keep_domain as keep_domain
    from .surgery.resize_domains import merge_domains as merge_domains

_MODULES = {  # of the public names, separated by spaces
    "auditing": "audit",
    "config": "load_config",
    "distributed.roi_shuffle": "RoIShuffle",
    "engine": "HookBase train",
    "errors": "UserError",
    "evaluation": "evaluate",
    "layers": "BatchGroupNorm BatchRenorm DomainBatchNorm DomainSequential FrozenBatchNorm GhostBatchNorm "
    "GroupedBatchNorm SeqNorm get_norm",
    "modeling": "build_model",
    "ops.moments": "Moments",
    "ops.select": "backends",
    "prediction": "Predictor",
    "statistics.choose": "set_statistics",
    "statistics.example_weight": "choose_example_weight set_example_weight",
    "statistics.merge": "merge_population_statistics",
    "statistics.recompute": "recompute_population_statistics",
    "statistics.virtual_batch": "virtual_batch",
    "surgery.convert": "convert_batchnorm convert_groupnorm",
    "surgery.domains": "name_domains use_domain",
    "surgery.export": "export_model",
    "surgery.freeze": "freeze_batchnorm",
    "surgery.fuse": "fuse",
    "surgery.nearest": "nearest_domain",
    "surgery.resize_domains": "add_domain keep_domain merge_domains",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'domainnorm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
