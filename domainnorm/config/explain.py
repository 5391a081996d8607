"""What the options of a config are, as text."""

import inspect
import textwrap

from ..errors import UserError, cut
from .option import Option, nearest_to
from .schema import OPTIONS, RENAMED, SECTIONS


def explain(key: str = "") -> str:
    """What an option is: comment, default, type, choices or range, section. Or the options of a section, one a line.

    Args:
        key: of an option, also its old one; of a section, such as `MODEL.RETINANET`; "": all options.

    Raises:
        UserError: unknown key, naming the nearest known one.
    """
    key = RENAMED.get(key, key)
    if key in OPTIONS:
        return _explain_option(OPTIONS[key])
    found = [option for name, option in OPTIONS.items() if not key or name.startswith(f"{key}.")]
    if not found:
        raise UserError(f"unknown key {cut(key)}; the nearest known key is {nearest_to(key, [*OPTIONS, *SECTIONS])}")
    said = [comment(key), ""] if key and key in SECTIONS else []
    return "\n".join([*said, *(f"{option.key}: {option.default!r}  # {option.doc}" for option in found)])


def facts(option: Option) -> dict[str, str]:
    """What is known of an option beside its key and comment: default, type, choices or range, and what else it has."""
    choices = ", ".join(map(repr, option.allowed)) if isinstance(option.allowed, tuple) else ""
    found = {
        "default": repr(option.default),
        "type": f"list of {option.type.__name__}" if option.is_list else option.type.__name__,
        "choices" if choices else "range": choices or str(option.allowed or ""),
        "length": str(option.length or (option.min_length and f"{option.min_length} or more") or ""),
        "used by": ", ".join(option.used_by),
        "old name": option.renamed_from,
    }
    return {name: fact for name, fact in found.items() if fact}


def _explain_option(option: Option) -> str:
    section = option.key.rpartition(".")[0]
    lines = [option.key, option.doc, *(f"{name}: {fact}" for name, fact in facts(option).items())]
    return "\n  ".join([*lines, f"section: {section or 'none'}"]) + "\n" + textwrap.indent(comment(section), "    ")


def comment(section: str) -> str:
    """What is said of a section."""
    return inspect.cleandoc(SECTIONS[section].__doc__ or "")
