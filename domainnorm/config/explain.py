"""What the options of a config are, as text."""

import inspect

from ..errors import UserError
from .option import Option, Range, nearest_to
from .schema import OPTIONS, RENAMED, SECTIONS, nearest_key


def explain(key: str = "") -> str:
    """What an option is: default, type, choices or range, and comment. Or the options of a section, one a line.

    Args:
        key: of an option, also its old one; of a section, such as `MODEL.RETINANET`; "": all options.

    Raises:
        UserError: unknown key, naming the nearest known ones.
    """
    key = RENAMED.get(key, key)
    if key in OPTIONS:
        return _explain_option(OPTIONS[key])
    options = [option for option in OPTIONS.values() if not key or option.key.startswith(f"{key}.")]
    if not options:
        section = nearest_to(key, [name for name in SECTIONS if name])
        raise UserError(
            f"unknown key {key}; the nearest known key is {nearest_key(key)}, the nearest section {section}"
        )
    comment = [inspect.cleandoc(SECTIONS[key].__doc__ or ""), ""] if key in SECTIONS and key else []
    return "\n".join([*comment, *(f"{option.key}: {option.default!r}  # {option.doc}" for option in options)])


def _explain_option(option: Option) -> str:
    kind = f"list of {option.type.__name__}" if option.is_list else option.type.__name__
    lines = [option.key, f"  {option.doc}", f"  default: {option.default!r}", f"  type: {kind}"]
    if isinstance(option.allowed, Range):
        lines.append(f"  range: {option.allowed}")
    elif option.allowed is not None:
        lines.append(f"  choices: {', '.join(map(repr, option.allowed))}")
    if option.length or option.min_length:
        lines.append(f"  length: {option.length or f'{option.min_length} or more'}")
    if option.used_by:
        lines.append(f"  used by MODEL.META_ARCHITECTURE: {', '.join(option.used_by)}")
    if option.renamed_from:
        lines.append(f"  old name: {option.renamed_from}")
    return "\n".join(lines)
