"""Every bad YAML file is one line that names the file and what is wrong with it; no file hangs or ends the process."""

import math
import os
import time

import pytest

import domainnorm as dn
from domainnorm.config import flatten
from domainnorm.config.load import MAX_BASES
from domainnorm.config.yaml_text import MAX_LEVELS, MAX_SIZE
from domainnorm.errors import MAX_QUOTED

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghijklmnop", "bcdefghijklmnopq", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}]\n" for k in range(1, 5000))


def refused(file):
    start = time.process_time()
    with pytest.raises(dn.UserError) as error:
        dn.load_config(file)
    assert time.process_time() - start < 5
    message = str(error.value)
    assert message.isprintable() and len(message) < 600 + len(str(file)), message
    assert ".yaml" in message or " takes a number " in message
    return message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a mapping of keys to values, got NoneType"),
        (b"\n# nothing\n", "expected a mapping"),
        (b"---\n...\n", "expected a mapping"),
        (b"SEED", "expected a mapping"),
        (b"[SEED, 3]", "expected a mapping"),
        (b"2020-01-01", "expected a mapping of keys to values, got date"),
        ("SEED: 3".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("SEED: 3".encode("utf-16-le"), "line 1: the character '\\x00' is not allowed"),
        ("SEED: 3".encode("utf-32"), "save it as UTF-8"),
        ("# Köln\nOUTPUT_DIR: Köln".encode("latin-1"), "byte 0xf6 in line 1; save it as UTF-8"),
        (b"SEED: 3\nOUTPUT_DIR: \x80", "byte 0x80 in line 2"),
        (b"SEED: 3\n\x00", "line 2: the character '\\x00' is not allowed"),
        (b"SEED: 3\nOUTPUT_DIR: \x1b[31m", "line 2: the character '\\x1b' is not allowed"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "save it as UTF-8"),
        (bytes(range(255, 31, -1)) * 10, "not valid YAML"),
        (b"#" * (MAX_SIZE + 1), f"is larger than {MAX_SIZE} bytes"),
        (b"SEED: 3\n\tSOLVER: {}", "line 2: found character '\\t'"),
        (b"SOLVER:\n\tMAX_ITER: 3", "line 2: found character '\\t'"),
        (b"SEED: [3", "line 1: expected ',' or ']'"),
        (b"SEED: {3", "line 1"),
        (b'OUTPUT_DIR: "x', "line 1: found unexpected end of stream"),
        (b"OUTPUT_DIR: 'x\n\n", "found unexpected end of stream"),
        (b"SEED: 3\n MAX: 4", "line 2: mapping values are not allowed here"),
        (b"OUTPUT_DIR: a: b", "line 1: mapping values are not allowed here"),
        (b"OUTPUT_DIR: @x", "line 1: found character '@'"),
        (b"OUTPUT_DIR: %x", "line 1: found character '%'"),
        (b"OUTPUT_DIR: `x`", "line 1: found character '`'"),
        (b'OUTPUT_DIR: "\\q"', "line 1: found unknown escape character 'q'"),
        (b'OUTPUT_DIR: "\\UFFFFFFFF"', "not valid YAML"),
        (b"SEED: 3\n---\nSEED: 4", "line 2: but found another document"),
        (b"SEED: 3\n...\n...\nSEED: 4", "not valid YAML"),
        (b"%YAML 9.9\n---\nSEED: 3", "line 1: found incompatible YAML document"),
        (b"%TAG ! x\n%TAG ! y\n---\nSEED: 3", "line 2: duplicate tag handle"),
        (b"SEED: !x 3", "line 1: could not determine a constructor for the tag '!x'"),
        (b"SEED: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (b"SEED: !!int ''", "a value that is not of its type"),
        (b"SEED: !!float x", "a value that is not of its type"),
        (b"SEED: !!bool x", "a value that is not of its type"),
        (b"SEED: !!timestamp x", "a value that is not of its type"),
        (b"SEED: !!binary x", "line 1: failed to decode base64"),
        (b"SEED: 2020-13-45", "month must be in 1..12"),
        (b"SEED: " + b"9" * 5000, "a value that is not of its type"),
        (b"SEED: *x", "line 1: found undefined alias 'x'"),
        (b"SEED: &x 1\nOUTPUT_DIR: &x 2", "line 2: second occurrence"),
        (b"SOLVER: &x {MAX_ITER: *x}", "line 1: an alias of what it is in"),
        (b"&x SOLVER: {MAX_ITER: 3}\nMODEL: &y [[*y]]", "line 2: an alias of what it is in"),
        (b"&x\nSOLVER: *x", "an alias of what it is in"),
        (b"SOLVER: &x {<<: *x}", "an alias of what it is in"),
        (LAUGHS.encode(), "values, with aliases written out"),
        (MERGES.encode(), "values, with aliases written out"),
        (CHAIN.encode(), f"line {MAX_LEVELS}: nested more than"),
        (b"SEED: " + b"[" * 10**5, f"nested more than {MAX_LEVELS} levels deep"),
        (b"SEED: " + b"{a: " * 10**4, "nested more than"),
        (b"- " * 10**4, "nested more than"),
        (b"? " * 10**4, "nested more than"),
        (b"".join(b"%sa:\n" % (b" " * k) for k in range(500)), "nested more than"),
        (b"SOLVER: {<<: 3}", "line 1: expected a mapping or list of mappings for merging"),
        (b"SEED: 1\nOUTPUT_DIR: x\nSEED: 2", "line 3: the key SEED is repeated, it is in line 1 already"),
        (b"SOLVER:\n  MAX_ITER: 1\n  MAX_ITER: 1", "line 3: the key MAX_ITER is repeated, it is in line 2 already"),
        (b"SOLVER: {MAX_ITER: 1}\nSOLVER: {BASE_LR: 1}", "line 2: the key SOLVER is repeated"),
        (b"_BASE_: a\n_BASE_: b", "line 2: the key _BASE_ is repeated"),
        (b"SOLVER: {MAX_ITER: 1}\nSOLVER.MAX_ITER: 2", "SOLVER.MAX_ITER is repeated, once in a section"),
        (b"3: 4", "line 1: keys are names, got 3 (int)"),
        (b"SOLVER:\n  on: 4", "line 2: keys are names, got on (bool)"),
        (b"~: 4", "line 1: keys are names, got ~ (null)"),
        (b".nan: 4", "keys are names, got .nan (float)"),
        (b"2020-01-01: 4", "keys are names, got 2020-01-01 (timestamp)"),
        (b"[a, b]: 4", "keys are names, got a list or mapping (seq)"),
        (b"? {a: b}\n: 4", "keys are names, got a list or mapping (map)"),
        (b"SEED: 010", "line 1: YAML reads 010 to the base 8 or 60"),
        (b"SOLVER: {MAX_ITER: 1:30}", "line 1: YAML reads 1:30 to the base 8 or 60"),
        (b"SEED: 2020-01-01", "SEED takes int (such as 0), got datetime.date(2020, 1, 1) (date)"),
        (b"DATASETS: {TRAIN: [2020-01-01]}", "put quotes around names"),
        (b"SEED: 2001-12-14t21:59:43.10-05:00", "SEED takes int"),
        (b"SEED: !!set {a, b}", "SEED takes int"),
        (b"SEED: !!omap [a: 1]", "SEED takes int"),
        (b"SEED: !!binary aGFsbG8=", "SEED takes int (such as 0), got b'hallo' (bytes)"),
        (b"DATASETS: {TRAIN: !!pairs [a: 1]}", "DATASETS.TRAIN takes a list"),
        (b"SEED: 1e400", "SEED takes int"),
        (b"SOLVER: {BASE_LR: 1e400}", "SOLVER.BASE_LR takes a number above 0, got inf"),
        (b"SOLVER: {BASE_LR: -.inf}", "SOLVER.BASE_LR takes a number above 0"),
        (b"SOLVER: {BASE_LR: .nan}", "SOLVER.BASE_LR takes a number above 0, got nan"),
        (b"SOLVER: {BASE_LR: 1%s}" % (b"0" * 400), "SOLVER.BASE_LR takes a number above 0, got inf"),
        (b"SOLVER: {BASE_LR: -1%s}" % (b"0" * 400), "got -inf"),
        (b"SEED: 18446744073709551616", "SEED takes a number up to 4294967295, got 18446744073709551616"),
        (b"SEED: -9223372036854775809", "SEED takes a number from 0 on"),
        (b"SEED: 1%s" % (b"0" * 1000), "got a number of about 1000 digits"),
        (b"SEED: 0x%s" % (b"f" * 9000), "got a number of about 10"),
        (b"SEED: yes", "SEED takes int (such as 0), got True (bool)"),
        (b"SEED:", "SEED takes int (such as 0), got None (NoneType)"),
        (b"OUTPUT_DIR: %s" % (b"x" * 5000) + b"\nSEED: %s" % (b"y" * 5000), "SEED takes int (such as 0), got 'yyyy"),
        (b"%s: 3" % (b"k" * 1000), "unknown key kkkk"),
        (b'"a\\nb\\u2028c": 3', r"unknown key a\nb\u2028c; the nearest known key is"),
        (b'SEED: "a\\nb\\e[31m"', r"SEED takes int (such as 0), got 'a\nb\x1b[31m' (str)"),
        (b"SEED: '%s'" % (b"(" * 10**5), "SEED takes int (such as 0), got '(((("),
        (b"SEED: '%s1'" % (b"-" * 10**5), "SEED takes int (such as 0), got '----"),
        (b"DATASETS: {TRAIN: '%s'}" % (b"[" * 10**5), "DATASETS.TRAIN takes a list"),
        (b"DATASETS: {TRAIN: '[&a [x], *a, [*a]]'}", "DATASETS.TRAIN takes a list"),
        (b"DATASETS: {TRAIN: '[&a [*a]]'}", "DATASETS.TRAIN takes a list"),
        (b"MODEL: {_BASE_: x}", "unknown key MODEL._BASE_"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_bad_file(tmp_path, content, message):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    assert message in refused(file)


@pytest.mark.parametrize(
    "content",
    [
        "SEED: 3".encode("utf-8-sig"),
        b"SEED: 3\r\nSOLVER:\r\n  MAX_ITER: 7\r\n",
        b"--- # a document\nSEED: 3\n...\n",
        b'"SEED": !!int 3',
        b"SEED: 0x3",
        b"SOLVER: &s {MAX_ITER: 7}\nSEED: 3",
        b"SOLVER: {<<: {MAX_ITER: 5}, BASE_LR: 0.1, MAX_ITER: 7}\nSEED: 3",
        b"INPUT: {MIN_SIZE_TEST: &n 640, MAX_SIZE_TEST: *n}\nSEED: 3",
        b"SOLVER.MAX_ITER: 7\nSEED: 3",
    ],
)
def test_a_good_file(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    assert dn.load_config(tmp_path / "c.yaml").SEED == 3


# ---- _BASE_ --------------------------------------------------------------------------------------------------------


def base(tmp_path, text, **files):
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    file = tmp_path / "c.yaml"
    file.write_text(f"_BASE_: {text}\nSEED: 3")
    return file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "_BASE_ takes a file or a list of files, got") for text in ("3", "~", "true", "{a: b}", "[[a.yaml]]")),
        *((text, "_BASE_ takes a file or a list of files, got") for text in ("[3]", "[null]", "2020-01-01")),
        ("nowhere.yaml", "nowhere.yaml does not exist"),
        ("''", "is a folder; expected a YAML file"),
        (".", "is a folder; expected a YAML file"),
        ("/dev/null", "/dev/null is no regular file; expected a YAML file"),
        ("pipe", "pipe is no regular file; expected a YAML file"),
        ("dangling", "dangling does not exist"),
        ("loop", "loop does not exist"),
        ("c.yaml", "c.yaml: is a _BASE_ of itself"),
        ("[one.yaml, ./c.yaml]", "is a _BASE_ of itself"),
        ("one.yaml/x", "one.yaml/x does not exist"),
        (r'"a\0b"', "holds a character that no path can have"),
        (r'"\ud800"', "holds a character that no path can have"),
        ("x" * 300, "is too long, 300 characters"),
        ("~nobody-at-all/x", "no such user"),
        ("'~/nowhere.yaml'", "nowhere.yaml does not exist"),
    ],
)
def test_a_bad_base(tmp_path, text, message):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(dn.UserError) as error:
        dn.load_config(base(tmp_path, text, one="SEED: 1"))
    assert message in str(error.value) and str(error.value).isprintable()


def test_bases_in_a_circle(tmp_path):
    file = base(tmp_path, "a.yaml", a="_BASE_: b.yaml", b="_BASE_: [a.yaml]")
    assert "a.yaml: is a _BASE_ of itself" in refused(file).replace("config file ", "")


def test_bases_too_deep(tmp_path):
    (tmp_path / "b0.yaml").write_text("SEED: 3")
    for k in range(1, 2000):
        (tmp_path / f"b{k}.yaml").write_text(f"_BASE_: b{k - 1}.yaml")
    assert dn.load_config(tmp_path / f"b{MAX_BASES}.yaml").SEED == 3
    with pytest.raises(dn.UserError, match=f"has more than {MAX_BASES} files above it"):
        dn.load_config(tmp_path / "b1999.yaml")


def test_bases_that_explode_are_read_once(tmp_path):
    (tmp_path / "b0.yaml").write_text("SEED: 3")
    for k in range(1, MAX_BASES):
        (tmp_path / f"b{k}.yaml").write_text(f"_BASE_: [{', '.join([f'b{k - 1}.yaml'] * 100)}]")
    start = time.process_time()
    assert dn.load_config(tmp_path / f"b{MAX_BASES - 1}.yaml").SEED == 3
    assert time.process_time() - start < 5


def test_the_order_of_bases(tmp_path):
    """Of two the last; a base of both does not win over the first."""
    (tmp_path / "root.yaml").write_text("SEED: 1\nSOLVER: {MAX_ITER: 1}")
    (tmp_path / "a.yaml").write_text("_BASE_: root.yaml\nSEED: 2")
    (tmp_path / "b.yaml").write_text("SOLVER: {MAX_ITER: 5}")
    (tmp_path / "c.yaml").write_text("_BASE_: [a.yaml, b.yaml]")
    cfg = dn.load_config(tmp_path / "c.yaml")
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER) == (2, 5)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_cannot_be_read(tmp_path):
    file = base(tmp_path, "a.yaml", a="SEED: 3")
    (tmp_path / "a.yaml").chmod(0)
    with pytest.raises(dn.UserError, match="cannot be read: Permission denied"):
        dn.load_config(file)


@pytest.mark.parametrize("name", ["nowhere.yaml", "", ".", "pipe", "a\0b", "x" * 300, "~nobody-at-all/x"])
def test_a_file_that_is_none(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(dn.UserError) as error:
        dn.load_config(name)
    assert str(error.value).isprintable()


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    base(tmp_path, "~/a.yaml", a="SOLVER: {MAX_ITER: 7}")
    cfg = dn.load_config("~/c.yaml")
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER) == (3, 7)


# ---- overrides -----------------------------------------------------------------------------------------------------


def nested():
    """Of 9**40 elements, if written out."""
    value = ["x"]
    for _ in range(40):
        value = [value] * 9
    return value


def circle():
    value = []
    value.append(value)
    return value


VALUES = {  # made where they are used: pytest would write them out
    "nested": nested,
    "circle": circle,
    "mapping": lambda: {"a": circle()},
    "large": lambda: 10**5000,
    "small": lambda: -(10**5000),
    "list": lambda: [10**5000],
    "bytes": lambda: b"x",
    "set": lambda: {1, 2},
    "object": object,
    "complex": lambda: 1j,
    "range": lambda: range(3),
    "nan": lambda: [math.nan],
}


@pytest.mark.parametrize("name", VALUES)
def test_values_from_python(name):
    for key in ("SEED", "SOLVER.BASE_LR", "SOLVER.STEPS", "DATASETS.TRAIN", "OUTPUT_DIR", "MODEL.MASK_ON"):
        with pytest.raises(dn.UserError, match=f"{key} takes ") as error:
            dn.load_config(None, [key, VALUES[name]()])
        assert str(error.value).isprintable() and len(str(error.value)) < 300


def test_what_is_quoted_is_cut():
    for overrides in (
        ["OUTPUT_DIR"] * 301,
        ["x" * 10**6, 1],
        ["SEED", "x" * 10**6],
        ["SOLVER.STEPS", list(range(1, 10**5))[::-1]],
        ["MODEL.BACKBONE.NORM", "x" * 10**6],
        ["MODEL.BACKBONE.NAME", "x" * 10**6],
        ["DATASETS.DOMAINS", ["x\n" * 10**6], "DATASETS.TRAIN", ["x"]],
        ["DATASETS.RENAME", ["x" * 10**6]],
        ["DATASETS.TRAIN", ["x"] * 1000, "DATASETS.DOMAINS", ["x"] * 1000 + ["y" * 10**6]],
    ):
        with pytest.raises(dn.UserError) as error:
            dn.load_config(None, overrides)
        assert len(str(error.value)) < 4 * MAX_QUOTED + 100, str(error.value)


def test_a_key_that_comes_twice_on_the_command_line():
    assert flatten(dn.load_config(None, ["SEED", 1, "SEED", 2]))["SEED"] == 2
