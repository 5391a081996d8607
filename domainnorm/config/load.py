"""Loading a config from YAML files and overrides, and saving it."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from ..errors import UserError, cut, quote
from ..output import replace_file
from ..paths import user_path
from .check import check
from .node import build_config, walk
from .schema import OPTIONS, RENAMED, nearest_key
from .values import convert
from .yaml_text import MAX_SIZE, read_yaml

MAX_BASES = 20  # of one another

logger = logging.getLogger(__name__)


def load_config(file: str | Path | None = None, overrides: Sequence[Any] = ()) -> CfgNode:
    """Load a config: the defaults, then `file` (and its `_BASE_` files), then `overrides`.

    Args:
        file: YAML, in UTF-8. A file that does not exist is looked up among the library's own, by its path below
            `configs`: `"quickstart.yaml"`, `"configs/paper/table5/row1.yaml"`. None: only the defaults.
        overrides: `[KEY, VALUE, KEY, VALUE, …]`. Values may be Python values, or strings as on a command line; a string
            may be a list in YAML, `"[a.json:images, b.json:images]"`, or Python syntax. The old name of a key is
            accepted, with a warning that gives the new one.

    Returns:
        A frozen config.

    Raises:
        UserError: an unknown key (the message names the nearest known one), a wrong type, a value outside its choices
            or range, contradicting keys, or a missing or broken file.

    Example::

        >>> cfg = dn.load_config("quickstart.yaml", ["SOLVER.BASE_LR", 0.01])
        >>> cfg.SOLVER.BASE_LR, cfg.MODEL.RETINANET.POPULATION_STATISTICS
        (0.01, 'per_domain')
    """
    values = {} if file is None else _read_file(_found(user_path(file)))
    if len(overrides) % 2:
        raise UserError(f"overrides: expected KEY VALUE pairs, got {len(overrides)} words: {quote(list(overrides))}")
    pairs = zip(map(str, overrides[0::2]), overrides[1::2], strict=True)
    cfg = build_config(values | _read_pairs(pairs, "overrides"))
    check(cfg)
    cfg.freeze()
    return cfg


def save_config(cfg: CfgNode, file: str | Path) -> None:
    """Write `cfg` as YAML that `load_config` reads back to an equal config."""
    with replace_file(user_path(file)) as stream:
        stream.write(cfg.dump())


def own_configs() -> Path:
    """The folder of the library's own configs: within the package or, in its source tree, beside it."""
    package = Path(__file__).parent.parent
    return next((folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()), package)


def _found(file: Path) -> Path:
    """`file` or, where it does not exist, the library's own config of that name."""
    own = own_configs() / (Path(*file.parts[1:]) if file.parts[:1] == ("configs",) else file)
    return own if not file.exists() and own.is_file() else file


def _read_file(
    file: Path, above: tuple[Path, ...] = (), known: dict[Path, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The values in `file`, over those of its `_BASE_` files.

    Args:
        above: the files that it is a base of.
        known: the values of the files that were read, however often one is a base.
    """
    known = {} if known is None else known
    _check_file(file, above)
    path = file.resolve()
    if path in known:
        return known[path]
    tree = _read_tree(file)
    values: dict[str, Any] = {}
    bases = tree.pop("_BASE_", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise UserError(f"config file {file}: _BASE_ takes a file or a list of files, got {quote(bases)}")
        values |= _read_file(file.parent / user_path(base), (*above, file), known)
    known[path] = values | _read_pairs(walk(tree), str(file), repeated=False)
    return known[path]


def _check_file(file: Path, above: tuple[Path, ...]) -> None:
    who = f"config file {above[-1]}: its _BASE_ {file}" if above else f"config file {file}:"
    if file.is_dir():
        raise UserError(f"{who} is a folder; expected a YAML file")
    if file.exists() and not file.is_file():
        raise UserError(f"{who} is no regular file; expected a YAML file")
    if not file.is_file() and above:
        raise UserError(f"{who} does not exist")
    if not file.is_file():
        own = ", ".join(sorted(path.name for path in own_configs().glob("*.yaml")))
        raise UserError(f"{who} no such file, nor one of the library's own: {own}, paper/…")
    if file.resolve() in (other.resolve() for other in above):
        raise UserError(f"config file {file}: is a _BASE_ of itself")
    if len(above) > MAX_BASES:
        raise UserError(f"{who} has more than {MAX_BASES} files above it; put some of them together")


def _read_tree(file: Path) -> dict[str, Any]:
    """What `file` says, by section."""
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_SIZE + 1)
    except OSError as error:
        raise UserError(f"config file {file}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_SIZE:
        raise UserError(f"config file {file}: is larger than {MAX_SIZE} bytes; expected a YAML file")
    try:
        tree = read_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = (
            "UTF-16"
            if content[:2] in (b"\xff\xfe", b"\xfe\xff")
            else f"byte {content[error.start]:#04x} in line {line}"
        )
        raise UserError(f"config file {file}: not valid YAML: {found}; save it as UTF-8") from error
    except ValueError as error:
        raise UserError(f"config file {file}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"config file {file}: expected a mapping of keys to values, got {type(tree).__name__}")
    return tree


def _read_pairs(pairs: Iterable[tuple[str, Any]], source: str, repeated: bool = True) -> dict[str, Any]:
    """Values by key, in the types of the options; the last one where a key is `repeated`, if it may be."""
    values: dict[str, Any] = {}
    names: dict[str, str] = {}  # by key, which one of its two names it is written with
    for name, value in pairs:
        key = RENAMED.get(name, name)
        if key not in OPTIONS:
            raise UserError(f"{source}: unknown key {cut(name)}; the nearest known key is {nearest_key(name)}")
        if names.get(key, name) != name:
            raise UserError(f"{source}: {names[key]} and {name} are names of the same option; give {key} alone")
        if key in names and not repeated:
            raise UserError(f"{source}: {name} is repeated, once in a section and once with dots; give one of them")
        names[key] = name
        values[key] = convert(OPTIONS[key], value, source)
    if old := [f"{name} is now {key}" for key, name in names.items() if name != key]:
        logger.warning("%s: renamed keys: %s", source, "; ".join(old))
    return values
