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


def changed_options(cfg: CfgNode) -> dict[str, Any]:
    """The options that are not at their defaults, by key."""
    values = {key: get_value(cfg, key) for key in OPTIONS}
    return {key: value for key, value in values.items() if value != OPTIONS[key].default}


def flatten(tree: Mapping[Any, Any], section: str = "") -> dict[str, Any]:
    """The value of every option by its key, as it is written in `tree`."""
    return dict(walk(tree, section))


def walk(tree: Mapping[Any, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """The pairs of `flatten`, also where a key comes twice: in a section, and written with dots."""
    for name, value in tree.items():
        key = f"{section}{name}"
        is_section = isinstance(value, dict) and value and key not in OPTIONS and key not in RENAMED
        yield from walk(value, f"{key}.") if is_section else ((key, value),)


def iteration_of(cfg: CfgNode, when: float) -> int:
    """The iteration that an option gives as such or, below 1, as a share of `SOLVER.MAX_ITER`."""
    return round(when * cfg.SOLVER.MAX_ITER) if when < 1 else int(when)
