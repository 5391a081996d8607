"""Loading a config from YAML files and overrides, and saving it."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from ..errors import UserError
from .check import check
from .node import build_config, flatten
from .schema import OPTIONS, RENAMED, nearest_key
from .values import convert

logger = logging.getLogger(__name__)


def load_config(file: str | Path | None = None, overrides: Sequence[Any] = ()) -> CfgNode:
    """The defaults, then `file` (and its `_BASE_` files), then `overrides`.

    Args:
        file: YAML. One that does not exist is looked for among the library's own, by its path below `configs`:
            `"quickstart.yaml"`, `"configs/paper/table5/row1.yaml"`. None: the defaults.
        overrides: `[KEY, VALUE, KEY, VALUE, …]`. Values may be strings, as on a command line, or Python values; a
            string may be a list as in YAML, `"[a.json:images, b.json:images]"`, or as in Python. The old name of a key
            is accepted, with a warning that gives the new one.

    Returns:
        A frozen config.

    Raises:
        UserError: unknown key (naming the nearest known one), wrong type, value outside its choices or range,
            contradicting keys, missing or broken file.

    Example::

        >>> cfg = dn.load_config("quickstart.yaml", ["SOLVER.BASE_LR", 0.01])
        >>> cfg.SOLVER.BASE_LR, cfg.MODEL.RETINANET.POPULATION_STATISTICS
        (0.01, 'per_domain')
    """
    values = {} if file is None else _read_file(_found(Path(file)))
    if len(overrides) % 2:
        raise UserError(f"overrides: expected KEY VALUE pairs, got {len(overrides)} words: {list(overrides)}")
    pairs = zip(map(str, overrides[0::2]), overrides[1::2], strict=True)
    cfg = build_config(values | _read_pairs(pairs, "overrides"))
    check(cfg)
    cfg.freeze()
    return cfg


def save_config(cfg: CfgNode, file: str | Path) -> None:
    """Write `cfg` as YAML that `load_config` reads back to an equal config."""
    Path(file).write_text(cfg.dump(), encoding="utf-8")


def own_configs() -> Path:
    """The folder of the library's own configs: within the package or, in its source tree, beside it."""
    package = Path(__file__).parent.parent
    return next((folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()), package)


def _found(file: Path) -> Path:
    """`file` or, where it does not exist, the library's own config of that name."""
    own = own_configs() / (Path(*file.parts[1:]) if file.parts[:1] == ("configs",) else file)
    return own if not file.exists() and own.is_file() else file


def _read_file(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values in `file`, over those of its `_BASE_` files; `above`: the files that it is a base of."""
    if not file.is_file() and above:
        raise UserError(f"config file {above[-1]}: its _BASE_ {file} does not exist")
    if not file.is_file():
        own = ", ".join(sorted(path.name for path in own_configs().glob("*.yaml")))
        raise UserError(f"config file {file}: no such file, nor one of the library's own: {own}, paper/…")
    if file.resolve() in (other.resolve() for other in above):
        raise UserError(f"config file {file}: is a _BASE_ of itself")
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"config file {file}: not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"config file {file}: cannot be read: {error.strerror}") from error
    if not isinstance(tree, dict):
        raise UserError(f"config file {file}: expected a mapping of keys to values, got {type(tree).__name__}")
    values: dict[str, Any] = {}
    bases = tree.pop("_BASE_", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise UserError(f"config file {file}: _BASE_ takes a file or a list of files, got {bases!r}")
        values |= _read_file(file.parent / Path(base).expanduser(), (*above, file))
    return values | _read_pairs(flatten(tree).items(), str(file))


def _read_pairs(pairs: Iterable[tuple[str, Any]], source: str) -> dict[str, Any]:
    """Values by key, in the types of the options; the last one where a key comes twice."""
    values: dict[str, Any] = {}
    names: dict[str, str] = {}  # by key, which one of its two names it is written with
    for name, value in pairs:
        key = RENAMED.get(name, name)
        if key not in OPTIONS:
            raise UserError(f"{source}: unknown key {name}; the nearest known key is {nearest_key(name)}")
        if names.setdefault(key, name) != name:
            raise UserError(f"{source}: {names[key]} and {name} are names of the same option; give {key} alone")
        values[key] = convert(OPTIONS[key], value, source)
    if old := [f"{name} is now {key}" for key, name in names.items() if name != key]:
        logger.warning("%s: renamed keys: %s", source, "; ".join(old))
    return values
