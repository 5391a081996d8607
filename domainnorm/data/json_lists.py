"""The lists of a large JSON file, a block of their elements at a time: the file is never in memory as a whole."""

import codecs
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError, quote, reason_of
from .files import open_file

logger = logging.getLogger(__name__)

BLOCK = 128  # elements: what is made of them stays in a cache of the processor
PIECE = 2**20  # bytes that are read at once
PROGRESS = 4.0  # seconds from one line of progress to the next

_SPACE = re.compile(r"[ \t\n\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")


def read_lists(file: Path, keys: tuple[str, ...]) -> Iterator[tuple[str, int, list[Any]]]:
    """The lists that an object in `file` has under `keys`, in blocks: key, position of the first element, elements.

    Of an empty list there is one block. The other values are checked to be JSON, and dropped.

    Raises:
        UserError: missing, no regular file, not JSON (naming line and column), no object, or without one of `keys`, or
            with one twice or no list.
    """
    name = f"annotation file {file}"
    try:
        stream = open_file(file)
    except FileNotFoundError:
        raise UserError(f"{name}: no such file; check the path or $DETECTRON2_DATASETS") from None
    except (OSError, ValueError) as error:  # the latter of a path with a zero byte
        raise UserError(f"{name}: cannot be read ({reason_of(error)}); check the path") from error
    with stream:
        yield from _lists(_Text(name, stream), keys)


def _lists(text: "_Text", keys: tuple[str, ...]) -> Iterator[tuple[str, int, list[Any]]]:
    if text.next() != "{":
        text.value()
        text.end()
        raise UserError(f"{text.name}: expected a COCO object with {', '.join(keys[:-1])} and {keys[-1]}")
    found: list[str] = []
    separator = "{"
    while text.take(separator) and not (separator == "{" and text.next() == "}"):
        if text.next() != '"':
            raise text.error("Expecting property name enclosed in double quotes")
        key = text.value()
        if not text.take(":"):
            raise text.error("Expecting ':' delimiter")
        if key in keys:
            if key in found:
                raise UserError(f'{text.name}: has "{key}" twice; merge the two lists')
            if text.next() != "[":
                text.value()
                raise UserError(f'{text.name}: "{key}" is no list; expected a list of objects')
            first = 0
            for block in text.elements():
                yield key, first, block
                first += len(block)
        else:
            text.value()
        found.append(key)
        separator = ","
    if not text.take("}"):
        raise text.error("Expecting ',' delimiter")
    text.end()
    for key in keys:
        if key not in found:
            has = quote(sorted(found))
            raise UserError(f'{text.name}: has no "{key}"; it has {has}; expected COCO\'s format')


class _Text:
    """The text of a JSON file, of which only what is being parsed is in memory.

    Where a value does not end in what is in memory, more is read, and the value is parsed from its beginning.
    """

    def __init__(self, name: str, stream: BinaryIO) -> None:
        self.name = name
        self.stream = stream
        self.size = os.fstat(stream.fileno()).st_size
        self.scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
        self.text = ""
        self.at = 0  # in the text
        self.line, self.column = 1, 0  # of the text's beginning in the file
        self.ahead = self._read(4)  # bytes that are read and not decoded
        self.decoder = codecs.getincrementaldecoder(json.detect_encoding(self.ahead))()
        self.told = time.monotonic()

    def next(self) -> str:
        """The next character that is no space, which is not taken; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, character: str) -> bool:
        """Whether `character` is the next that is no space; then it is taken."""
        there = self.next() == character
        self.at += there
        return there

    def end(self) -> None:
        """Only spaces are left."""
        if self.next():
            raise self.error("Extra data")

    def value(self) -> Any:
        """The next value."""
        self.next()
        while True:
            try:
                value, end = self.scan(self.text, self.at)
                # A number may go on in what is not read yet, after "1e-" too.
                if end + 2 < len(self.text) or not self._more():
                    self.at = end
                    return value
            except StopIteration as error:
                if not self._more():
                    raise self.error("Expecting value", error.value) from None
            except json.JSONDecodeError as error:
                if not self._more():
                    raise self.error(error.msg, error.pos) from None
            except RecursionError:
                raise self.error("lists or objects are nested too deeply") from None
            except ValueError as error:  # an integer of thousands of digits
                raise self.error(str(error).partition(";")[0]) from None

    def elements(self) -> Iterator[list[Any]]:
        """The elements of the list that comes next, in blocks."""
        self.take("[")
        block: list[Any] = []
        if not self.take("]"):
            while True:
                try:  # an element and a comma that are both in memory, as a rule
                    element, end = self.scan(self.text, self.at)
                    comma = _COMMA.match(self.text, end)
                except (StopIteration, ValueError, RecursionError):
                    comma = None
                if comma:
                    self.at = comma.end()
                    block.append(element)
                else:
                    block.append(self.value())
                    if self.take("]"):
                        break
                    if not self.take(","):
                        raise self.error("Expecting ',' delimiter")
                if len(block) == BLOCK:
                    yield block
                    block = []
        yield block

    def error(self, what: str, position: int | None = None) -> UserError:
        """What is wrong at a position in the text, by default the next one."""
        position = self.at if position is None else position
        line, column = self._place(position)
        return UserError(f"{self.name}: not valid JSON at line {line} column {column + 1}: {what}")

    def _place(self, position: int) -> tuple[int, int]:
        lines = self.text.count("\n", 0, position)
        column = position - self.text.rfind("\n", 0, position) - 1 if lines else self.column + position
        return self.line + lines, column

    def _read(self, size: int) -> bytes:
        try:
            return self.stream.read(size)
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read ({error.strerror}); check the disk") from error

    def _more(self) -> bool:
        """Drop what was parsed and read on; False at the end of the file."""
        before = self.stream.tell() - len(self.ahead) - len(self.decoder.getstate()[0])
        # At least as much as is there already: a long value is parsed anew a few times only.
        piece = self.ahead + self._read(max(PIECE, len(self.text) - self.at))
        self.ahead = b""
        try:
            text = self.decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            encoding = error.encoding.upper()
            where = before + error.start
            raise UserError(f"{self.name}: not valid JSON: not {encoding} text at byte {where}") from error
        if not piece:
            return False
        self.line, self.column = self._place(self.at)
        self.text, self.at = self.text[self.at :] + text, 0
        if time.monotonic() > self.told + PROGRESS:
            self.told = time.monotonic()
            done, size = self.stream.tell(), max(self.size, 1)
            logger.info("%s: %.0f%% of %.0f MB read", self.name, 100 * done / size, size / 1e6)
        return True
