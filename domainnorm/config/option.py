"""What one option of a config is, and the sections in which options are declared."""

import difflib
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import UserError, cut, quote

MAX_CHOICES = 20  # in a message


@dataclass(frozen=True)
class Range:
    """Finite numbers from `min` to `max`, both included, and greater than `above`.

    Args:
        limit: far above what anybody needs, where something else would fail; told of only beyond it.
    """

    min: float = -math.inf
    max: float = math.inf
    above: float = -math.inf
    limit: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.min <= value <= min(self.max, self.limit) and self.above < value < math.inf

    def __str__(self) -> str:
        upper = f" to {_short(self.max)}" if self.max < math.inf else ""
        if self.above > -math.inf:
            return f"above {_short(self.above)}{upper and f', up{upper}'}"
        return f"from {_short(self.min)}{upper or ' on'}"

    def expected(self, value: float) -> str:
        """What it takes instead of `value`."""
        return f"up to {_short(self.limit)}" if self.limit < value < math.inf else str(self)


def _short(number: float) -> str:
    """Whole numbers in full, others to six digits."""
    return str(int(number)) if number == int(number) else f"{number:g}"


SHARE, BELOW_ONE = Range(min=0, max=1), Range(min=0, max=0.999999)
# Whole numbers, of which there is at least one, or possibly none. The largest is far above what anybody needs and far
# below where a product of two of them, as int64, or the memory of an empty layer ends.
ITERATIONS, ITERATIONS_OR_0 = Range(above=0, limit=2**31 - 1), Range(min=0, limit=2**31 - 1)
IMAGES, IMAGES_OR_0 = Range(above=0, limit=2**20), Range(min=0, limit=2**20)
OBJECTS = Range(above=0, limit=10**6)
PIXELS, PIXELS_OR_0 = Range(above=0, limit=2**16), Range(min=0, limit=2**16)
CHANNELS, CLASSES_OR_0 = Range(above=0, limit=2**13), Range(min=0, limit=10**5)
BINS = Range(above=0, limit=64)
LAYERS, LAYERS_OR_0 = Range(above=0, limit=100), Range(min=0, limit=100)
INTENSITY = Range(min=0, limit=2**32)


@dataclass(frozen=True)
class Option:
    """One option of a config, as declared in a `Section`.

    Args:
        default: also gives the type. A list has elements of one type.
        doc: one sentence: what the option does, in which unit, what special values mean.
        allowed: the choices, or the range of a number; for a list, those of each element.
        element: type of the elements of a list whose default is empty.
        length: of a list; None: any.
        min_length: of a list.
        used_by: values of `MODEL.META_ARCHITECTURE` for which the option has an effect; empty: those of the section.
        renamed_from: the old name in the same section, which is still accepted; the section makes a key of it.
        key: `SECTION.NAME`; set by the section.
    """

    default: Any
    doc: str
    allowed: tuple[Any, ...] | Range | None = None
    element: type = str
    length: int | None = None
    min_length: int = 0
    used_by: tuple[str, ...] = ()
    renamed_from: str = ""
    key: str = ""

    @property
    def is_list(self) -> bool:
        """Whether the option takes a list."""
        return isinstance(self.default, list)

    @property
    def type(self) -> type:
        """The type of the value or, for a list, of its elements."""
        example = self.default[:1] if self.is_list else [self.default]
        return type(example[0]) if example else self.element

    def check(self, value: Any) -> None:
        """Refuse a value outside of the choices, the range or the length.

        Raises:
            UserError: naming the key, what it got and what it takes.
        """
        elements = value if self.is_list else [value]
        if self.length not in (None, len(elements)):
            raise UserError(f"{self.key} takes {self.length} numbers, got {quote(value)}")
        if len(elements) < self.min_length:
            raise UserError(f"{self.key} takes at least one, got []")
        wrong = [element for element in elements if self.allowed is not None and element not in self.allowed]
        if wrong and isinstance(self.allowed, Range):
            raise UserError(f"{self.key} takes a number {self.allowed.expected(wrong[0])}, got {quote(value)}")
        if wrong:
            raise not_among(f"{self.key} takes {'any' if self.is_list else 'one'} of", wrong[0], self.allowed)


def not_among(takes: str, value: Any, choices: Any) -> UserError:
    """The error for a value that is none of `choices`, with the nearest of them."""
    nearest = nearest_to(str(value), [str(choice) for choice in choices])
    first = ", ".join(map(quote, list(choices)[:MAX_CHOICES])) + ", …" * (len(choices) > MAX_CHOICES)
    return UserError(f"{takes} [{first}], got {quote(value)}; nearest: {quote(nearest)}")


def nearest_to(name: str, names: Any) -> str:
    """The one of `names` that is spelled most like `name`."""
    return difflib.get_close_matches(cut(name), names, n=1, cutoff=0.0)[0]


class Section:
    """A group of options: a subclass whose attributes are its `Option`s, and whose docstring is its comment.

    Args of the class statement:
        key: prefix of the options' keys; "": none.
        used_by: as `Option`'s.
    """

    sections: ClassVar[dict[str, type["Section"]]] = {}
    options: ClassVar[dict[str, Option]] = {}

    def __init_subclass__(cls, key: str, used_by: tuple[str, ...] = ()) -> None:
        prefix = key and f"{key}."
        for name, option in [(name, value) for name, value in vars(cls).items() if isinstance(value, Option)]:
            old, used = option.renamed_from and prefix + option.renamed_from, option.used_by or used_by
            Section.options[prefix + name] = replace(option, key=prefix + name, used_by=used, renamed_from=old)
        Section.sections[key] = cls
