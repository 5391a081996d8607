"""Values of a config from YAML and the command line, in the types of their defaults."""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from .errors import UserError


def read_yaml(file: Path) -> dict[str, Any]:
    """The tree in a YAML file, over those of its `_BASE_` files.

    Raises:
        UserError: missing or broken file.
    """
    if not file.is_file():
        raise UserError(f"config file {file}: no such file")
    try:
        tree = CfgNode.load_yaml_with_base(str(file))
    except yaml.YAMLError as error:
        raise UserError(f"config file {file}: not valid YAML: {' '.join(str(error).split())}") from error
    except FileNotFoundError as error:
        raise UserError(f"config file {file}: its _BASE_ {error.filename} does not exist") from error
    if not isinstance(tree, dict):
        raise UserError(f"config file {file}: expected a mapping of keys to values, got {type(tree).__name__}")
    return tree


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`KEY.SUBKEY` and value of every option."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from leaves(value, key + ".")
        else:
            yield key, value


def set_value(cfg: CfgNode, key: str, value: Any, known: Mapping[str, Any], source: str) -> None:
    """Set an option, to a value of the type that it has in `known`; lists have an element there, to show it.

    Raises:
        UserError: unknown key (naming the nearest known one), or another type.
    """
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise UserError(f"{source}: unknown key {key}; the nearest known key is {nearest}")
    default = known[key]
    decoded = CfgNode._decode_cfg_value(value) if not isinstance(default, str) else value
    try:
        coerced = _coerce(decoded, default)
    except TypeError:
        raise UserError(
            f"{source}: {key} takes {_type_name(default)}, got {value!r} ({type(decoded).__name__})"
        ) from None
    *parents, leaf = key.split(".")
    node = cfg
    for parent in parents:
        node = node[parent]
    node[leaf] = coerced


def _coerce(value: Any, default: Any) -> Any:
    """`value` as the type of `default`; TypeError where that would be a guess."""
    if isinstance(default, list):
        if isinstance(value, str):  # a single data set or statistics name is a list of one
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return [_coerce(v, default[0]) for v in value]
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise TypeError
    return value


def _type_name(default: Any) -> str:
    return (
        f"a list such as {default}" if isinstance(default, list) else f"{type(default).__name__} (such as {default!r})"
    )


def iteration_of(cfg: CfgNode, when: float) -> int:
    """An iteration that an option gives as such or, below 1, as a share of `SOLVER.MAX_ITER`."""
    return round(when * cfg.SOLVER.MAX_ITER) if when < 1 else int(when)
