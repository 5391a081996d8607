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
    comment = [_comment(key), ""] if key and key in SECTIONS else []
    return "\n".join([*comment, *(f"{option.key}: {option.default!r}  # {option.doc}" for option in found)])


def _explain_option(option: Option) -> str:
    section = option.key.rpartition(".")[0]
    choices = isinstance(option.allowed, tuple) and ", ".join(map(repr, option.allowed))
    facts = {
        "default": repr(option.default),
        "type": f"list of {option.type.__name__}" if option.is_list else option.type.__name__,
        "choices" if choices else "range": choices or option.allowed,
        "length": option.length or (option.min_length and f"{option.min_length} or more"),
        "used by": ", ".join(option.used_by),
        "old name": option.renamed_from,
        "section": section or "none",
    }
    lines = [option.key, option.doc, *(f"{name}: {fact}" for name, fact in facts.items() if fact)]
    return "\n  ".join(lines) + "\n" + textwrap.indent(_comment(section), "    ")


def _comment(section: str) -> str:
    return inspect.cleandoc(SECTIONS[section].__doc__ or "")
