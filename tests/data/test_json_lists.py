"""The lists of a JSON file are what json.loads makes of it, and so are the mistakes, however the text is cut."""

import json
import os
import random
import socket

import pytest

from domainnorm.config import UserError
from domainnorm.data import json_lists
from domainnorm.data.json_lists import read_lists

KEYS = ("images", "annotations", "categories")
CONTENT = {
    "info": {"images": [1.5, 'a\\"]}', None], "é": [[], {}]},
    "images": [{"id": k, "name": "é\n\U0001f600" * k, "size": [1.25e-3, -0.0, 10**20]} for k in range(9)],
    "number": -12.5e3,
    "annotations": [],
    "categories": [1, "two", 3.5, None, True, [4], {"five": 5}, 123456789],
    "last": "x",
}


@pytest.fixture
def small(monkeypatch):
    """Pieces and blocks that cut everything."""
    monkeypatch.setattr(json_lists, "PIECE", 7)
    monkeypatch.setattr(json_lists, "BLOCK", 3)


def read(file):
    found = {}
    for key, first, block in read_lists(file, KEYS):
        assert len(found.setdefault(key, [])) == first and len(block) <= 3
        found[key] += block
    return found


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])
def test_equals_json(tmp_path, small, encoding, layout):
    (tmp_path / "a.json").write_bytes(json.dumps(CONTENT, **layout).encode(encoding))
    assert read(tmp_path / "a.json") == {key: CONTENT[key] for key in KEYS}


def message_of(file):
    with pytest.raises(UserError) as caught:
        read(file)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"annotation file {file}: ")
    return str(caught.value)


def test_mistakes_are_where_json_finds_them(tmp_path, small):
    """Of a valid text with some characters changed, line and column of the mistake are json's."""
    draw, file, mistakes = random.Random(0), tmp_path / "a.json", 0
    for _ in range(300):
        text = list(json.dumps(CONTENT, indent=draw.choice([None, 1])))
        at = draw.randrange(len(text))
        text[at : at + draw.randrange(3)] = draw.choice(["", '"', "]", "}", ",", "x", "\n", "[", "1e"])
        text = "".join(text)
        file.write_text(text)
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            message = message_of(file)
            if "is no list" not in message:  # which came before
                mistakes += 1
                assert f"not valid JSON at line {error.lineno} column {error.colno}: " in message, text
    assert mistakes > 100


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "line 1 column 1: Expecting value"),
        (b"[1, 2]", "expected a COCO object with images, annotations and categories"),
        (b"[1, 2", "line 1 column 6"),
        (b'"images"', "expected a COCO object"),
        (b"{}", 'has no "images"; it has []'),
        (b'{"images": []} x', "line 1 column 16: Extra data"),
        (b'{"images": [],}', "line 1 column 15: Expecting property name"),
        (b'{"images": [], "images": []}', 'has "images" twice'),
        (b'{"images": {"a": 1}}', '"images" is no list'),
        (b'{"images": [1 2]}', "line 1 column 15: Expecting ',' delimiter"),
        (b'{"images": ["\xff"]}', "not UTF-8 text at byte 13"),
        (b'{"info": "' + b"a" * 50 + b'\xc3"}', "not UTF-8 text at byte 60"),
        (b'{"images": "\xc3', "not UTF-8 text at byte 12"),
        (b"\xff\xfe{\x00\x00\xd8", "not UTF-16"),
        (b'{"info": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"info": ' + b"9" * 5000 + b"}", "4300 digits"),
    ],
)
def test_broken_files(tmp_path, small, content, expected):
    (tmp_path / "a.json").write_bytes(content)
    assert expected in message_of(tmp_path / "a.json")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "cannot be read (it is a named pipe, expected a file)" in message_of(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert "it is a socket" in message_of(tmp_path / "s")
    assert "it is a folder" in message_of(tmp_path)
    (tmp_path / "link").symlink_to("/dev/zero")
    assert "it is a device" in message_of(tmp_path / "link")


def test_a_long_file_says_how_far_it_is(tmp_path, monkeypatch, caplog, small):
    monkeypatch.setattr(json_lists, "PROGRESS", 0)
    (tmp_path / "a.json").write_text(json.dumps(CONTENT))
    with caplog.at_level("INFO", logger="domainnorm"):
        read(tmp_path / "a.json")
    assert len(caplog.messages) > 3 and caplog.messages[-1].endswith("% of 0 MB read")
