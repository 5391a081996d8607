"""What a field of a COCO file may be: entries of its lists, read by column, with errors that name the entry."""

import sys
from collections.abc import Callable
from itertools import chain
from operator import itemgetter
from typing import Any, NoReturn

import numpy as np

from ..errors import UserError

_MAX = sys.float_info.max


class Table:
    """Some entries of one list of a COCO file, as columns. All methods raise UserError.

    Args:
        source: what has the list, for errors: `annotation file …`.
        kind: the key that holds it.
        entries: of the list.
        first: position in the list of the first of them.
    """

    def __init__(self, source: str, kind: str, entries: list[Any], first: int = 0) -> None:
        self.source = source
        self.kind = kind
        self.entries: list[dict[str, Any]] = entries
        self.first = first
        for row, entry in enumerate(entries):
            if type(entry) is not dict:
                raise UserError(f"{source}: {kind}[{first + row}] is {brief(entry)}; expected an object")

    def integers(self, key: str, default: int | None = None) -> np.ndarray:
        """Column `key`, int64, (n,): whole numbers, also written as floats."""
        values = self._values(key, default)
        if set(map(type, values)) - {int}:
            self._check(key, values, _is_whole, "a whole number")
            values = [int(value) for value in values]
        return self._array(key, values, np.int64, _is_whole, "a whole number")

    def flags(self, key: str) -> np.ndarray:
        """Column `key`, bool, (n,): 0 or 1, also as floats or as false and true; without it, 0."""
        values = self._values(key, 0)
        if set(map(type, values)) - {int, bool} or not {0, 1}.issuperset(values):
            self._check(key, values, lambda v: type(v) in (int, float, bool) and v in (0, 1), "0 or 1")
        return np.array(values, dtype=bool)

    def areas(self, key: str) -> np.ndarray:
        """Column `key`, float64, (n,): finite and not negative; NaN where there is none."""
        values, expected = self._values(key, 0.0), "a finite number, not negative, or none at all"
        if set(map(type, values)) - {int, float}:
            self._check(key, values, _is_area, expected)
        column = self._array(key, values, np.float64, _is_area, expected)
        if not ((column >= 0) & (column < np.inf)).all():
            self._check(key, values, _is_area, expected)
        column[[row for row, entry in enumerate(self.entries) if key not in entry]] = np.nan
        return column

    def strings(self, key: str, default: str | None = None, *, empty: bool = True) -> list[str]:
        """Column `key`: strings that can be written as UTF-8, without zero bytes; if not `empty`, not "" either."""
        values = self._values(key, default)
        if set(map(type, values)) - {str} or not (empty or all(values)) or not all(map(str.isprintable, values)):
            self._check(
                key, values, lambda v: _is_text(v) and (empty or v != ""), f"a string{'' if empty else ', not empty'}"
            )
        return values

    def quadruples(self, key: str) -> np.ndarray:
        """Column `key`, float64, (n, 4): lists of four numbers. They need not be finite."""
        values = self._values(key, None)
        if (
            set(map(type, values)) - {list}
            or set(map(len, values)) - {4}
            or set(map(type, chain.from_iterable(values))) - {int, float}
        ):
            self._check(key, values, _is_quadruple, "four numbers")
        flat = list(chain.from_iterable(values))
        return self._array(key, flat, np.float64, _is_number, "four numbers").reshape(-1, 4)

    def _values(self, key: str, default: Any) -> list[Any]:
        try:  # all of them have it, as a rule
            return list(map(itemgetter(key), self.entries))
        except KeyError:
            return [entry.get(key, default) for entry in self.entries]

    def _check(self, key: str, values: list[Any], good: Callable[[Any], bool], expected: str) -> None:
        for row, value in enumerate(values):
            if not good(value):
                self.fail(row, key, expected)

    def _array(
        self, key: str, values: list[Any], dtype: type, good: Callable[[Any], bool], expected: str
    ) -> np.ndarray:
        """`values`, as many of each entry, of which one may be an integer that is too large."""
        try:
            return np.array(values, dtype=dtype)
        except OverflowError:
            row = next(position for position, value in enumerate(values) if not good(value))
            self.fail(row * len(self.entries) // len(values), key, expected)

    def fail(self, row: int, key: str, expected: str) -> NoReturn:
        """What entry `row` of these has under `key` is not what is expected."""
        entry = self.entries[row]
        name = f"{self.kind}[{self.first + row}]"
        if key != "id" and "id" in entry:
            name += f" (id {brief(entry['id'])})"
        got = f"has {key} {brief(entry[key])}" if key in entry else f"has no {key}"
        raise UserError(f"{self.source}: {name} {got}; expected {expected}")


def check_unique(source: str, kind: str, key: str, column: np.ndarray) -> None:
    """UserError if two entries of a list have an equal number."""
    _, first = np.unique(column, return_index=True)
    if len(first) < len(column):
        row = int(np.setdiff1d(np.arange(len(column)), first)[0])
        raise UserError(
            f"{source}: {kind}[{row}] has {key} {column[row]}, which an earlier entry has too; ids must be unique"
        )


def _is_whole(value: Any) -> bool:
    if type(value) is float:
        return value.is_integer() and abs(value) < 2**53
    return type(value) is int and -(2**63) < value < 2**63


def _is_area(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _MAX


def _is_quadruple(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and -_MAX <= value <= _MAX)


def _is_text(value: Any) -> bool:
    return type(value) is str and "\0" not in value and value.encode(errors="ignore").decode() == value


def brief(value: Any) -> str:
    """A value of a file on one line, cut."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
