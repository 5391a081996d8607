"""The options of a run: declared in `schema`, loaded, checked, saved and explained."""

from ..errors import UserError
from .explain import explain
from .load import load_config, save_config
from .node import changed_options, flatten, get_value, iteration_of
from .schema import OPTIONS, RENAMED
from .schema.evaluation import STATISTICS

__all__ = [
    "OPTIONS",
    "RENAMED",
    "STATISTICS",
    "UserError",
    "changed_options",
    "explain",
    "flatten",
    "get_value",
    "iteration_of",
    "load_config",
    "save_config",
]
