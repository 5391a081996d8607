"""YAML text as plain values, or the one thing that is wrong with it.

PyYAML itself takes forever over aliases of aliases; reads some things as what they do not look like (of two values of
one key the last, `010` as 8, `1:30` as 90); and raises errors of many kinds.
"""

import re
from typing import Any

import yaml

from ..errors import cut, one_line, quote

MAX_SIZE = 2**20  # characters
MAX_VALUES = 100_000  # with every alias written out
MAX_LEVELS = 32

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[0-9_]+(:[0-5]?[0-9])+(\.[0-9_]*)?)")
_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def read_yaml(text: str) -> Any:
    """What a text of one YAML document says, in Python's plain types.

    Raises:
        ValueError: in one line, what is wrong with it and, where known, in which line.
    """
    if len(text) > MAX_SIZE:
        raise ValueError(f"more than {MAX_SIZE} characters")
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark, reason = error.problem_mark or error.context_mark, error.problem or error.context
        raise ValueError(f"{f'line {mark.line + 1}: ' if mark else ''}{_begin(reason)}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: the character {quote(text[error.position])} is not allowed") from error
    except Exception as error:  # what makes a value of its text raises anything: for `!!int ''` an IndexError
        raise ValueError(f"a value that is not of its type ({type(error).__name__}: {_begin(error)})") from error
    finally:
        if loader is not None:
            loader.dispose()


def _begin(reason: object) -> str:
    return cut(one_line(reason))


class _Loader(yaml.SafeLoader):
    """PyYAML's, which refuses a document before it makes values of it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        self.levels += 1
        if self.levels > MAX_LEVELS:
            raise _too_deep(self.peek_event())
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _check(node, {})
        return node


def _check(node: yaml.Node, checked: dict[yaml.Node, tuple[int, int] | None]) -> tuple[int, int]:
    """The number of values in a node and of levels, with aliases written out. Each node is looked at once.

    Args:
        checked: those numbers by node; None for what `node` is in.
    """
    if node in checked:
        known = checked[node]
        if known is None:
            raise _wrong("an alias of what it is in", node)
        return known
    checked[node] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    elif node.tag in _NUMBERS and node.style is None and _OTHER_BASE.fullmatch(node.value):
        raise _wrong(f"YAML reads {_begin(node.value)} to the base 8 or 60; write the number, or put quotes", node)
    sizes = [_check(child, checked) for child in children]
    values, levels = 1 + sum(size for size, _ in sizes), 1 + max((deep for _, deep in sizes), default=0)
    if values > MAX_VALUES:
        raise _wrong(f"more than {MAX_VALUES} values, with aliases written out", node)
    if levels > MAX_LEVELS:
        raise _too_deep(node)
    checked[node] = values, levels
    return values, levels


def _check_keys(mapping: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEYS:
            name = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise _wrong(f"keys are names, got {_begin(name)} ({key.tag.rpartition(':')[2]})", key)
        if key.value in lines:
            raise _wrong(f"the key {_begin(key.value)} is repeated, it is in line {lines[key.value]} already", key)
        lines[key.value] = key.start_mark.line + 1


def _wrong(reason: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=reason, problem_mark=where.start_mark)


def _too_deep(where: Any) -> yaml.MarkedYAMLError:
    return _wrong(f"nested more than {MAX_LEVELS} levels deep", where)
