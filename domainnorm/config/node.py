"""Options within a tree: fvcore's `CfgNode`, or what a YAML file holds."""

from collections.abc import Iterator, Mapping
from functools import reduce
from operator import getitem
from typing import Any

from fvcore.common.config import CfgNode

from .schema import OPTIONS, RENAMED


def build_config(values: Mapping[str, Any]) -> CfgNode:
    """The config of `values` by key, and of the defaults of all other options."""
    tree: dict[str, Any] = {}
    for key, option in OPTIONS.items():
        node = tree
        *sections, name = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = values.get(key, option.default)
    return CfgNode(tree)  # a copy


def get_value(cfg: CfgNode, key: str) -> Any:
    """The value of the option `SECTION.NAME`."""
    return reduce(getitem, key.split("."), cfg)


def named_values(tree: Mapping[Any, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Key, as it is written in `tree`, and value of every option."""
    for name, value in tree.items():
        key = f"{section}{name}"
        if isinstance(value, dict) and value and key not in OPTIONS and key not in RENAMED:
            yield from named_values(value, f"{key}.")
        else:
            yield key, value


def iteration_of(cfg: CfgNode, when: float) -> int:
    """The iteration that an option gives as such or, below 1, as a share of `SOLVER.MAX_ITER`."""
    return round(when * cfg.SOLVER.MAX_ITER) if when < 1 else int(when)
