"""Values of options from YAML, the command line and Python, in the types of the options."""

import ast
import math
import warnings
from typing import Any

from ..errors import UserError, quote
from .option import Option
from .yaml_text import read_yaml


def convert(option: Option, value: Any, source: str) -> Any:
    """`value` in the type of `option`.

    Text is what it is for a string, and a Python literal, `true` or `false` for other types. A list is written as in
    Python, `['a', 'b']`, or as in YAML, `[a, b]`; a list of one string also as that string alone.

    Raises:
        UserError: it has another type; `source` says where it is.
    """
    found = value
    try:
        found = _read(option, value) if isinstance(value, str) else value
        if not option.is_list:
            return _element(option, found)
        if not isinstance(found, (str, list, tuple)):
            raise TypeError
        return [_element(option, element) for element in ([found] if isinstance(found, str) else found)]
    except TypeError:
        example = option.default or [option.type()] if option.is_list else repr(option.default)
        takes = f"a list such as {example}" if option.is_list else f"{option.type.__name__} (such as {example})"
        got = f"{quote(value)} ({type(found).__name__}){_advice(option, found)}"
        raise UserError(f"{source}: {option.key} takes {takes}, got {got}") from None


def _read(option: Option, text: str) -> Any:
    """What `text` stands for; TypeError for a list that is none in YAML or Python."""
    if text in ("None", "null"):
        return None
    if option.type is str and not option.is_list:
        return text
    found = _literal(text)
    if option.type is bool:
        return {"true": True, "false": False}.get(text.lower(), found)
    if found is not text or not text.lstrip().startswith(("[", "{")):
        return found
    try:
        return read_yaml(text)
    except ValueError:
        raise TypeError from None


def _literal(text: str) -> Any:
    """The Python literal that `text` is, else `text` itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a backslash that means nothing
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _element(option: Option, value: Any) -> Any:
    """`value` in the type of `option` or, of a list, of its elements; TypeError where that would be a guess."""
    if option.type is float:
        value = _literal(value) if isinstance(value, str) else value  # 1e-4 is a string in YAML 1.1
        value = _float(value) if type(value) is int else value
    if type(value) is not option.type:
        raise TypeError
    return value


def _float(number: int) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _advice(option: Option, found: Any) -> str:
    """What to write instead of a value that was read as something else than it was meant to be."""
    elements = found if isinstance(found, (list, tuple)) else [found]
    if None in elements:
        return f"; leave it out for its default, {option.default!r}"
    if any(isinstance(element, dict) for element in elements):
        return "; a colon before a space makes a mapping: write no space, or put quotes around the name"
    return "; put quotes around names that are read otherwise" if option.is_list and option.type is str else ""
