"""What is declared of each option holds; values are read from text; old keys are accepted; options are explained."""

import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import domainnorm as dn
from domainnorm.cli import explain as explain_tool
from domainnorm.config import RENAMED, explain, flatten, save_config
from domainnorm.config.option import Option, Range, Section
from domainnorm.config.schema import OPTIONS, SECTIONS

ROOT = Path(__file__).parents[2]

each_option = pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.key)
TRAIN = ["DATASETS.TRAIN", ["a:b", "c:d"]]


def load(*overrides):
    return flatten(dn.load_config(None, overrides))


def refused(*overrides):
    with pytest.raises(dn.UserError) as error:
        dn.load_config(None, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- declarations --------------------------------------------------------------------------------------------------


def test_the_config_has_the_declared_options():
    assert load() == {key: option.default for key, option in OPTIONS.items()}
    assert all(SECTIONS[key].__doc__ for key in SECTIONS)
    assert {key.rpartition(".")[0] for key in OPTIONS} == SECTIONS.keys()


@each_option
def test_the_comment_is_one_sentence(option):
    assert option.doc.endswith(".") and ".." not in option.doc and "\n" not in option.doc and "  " not in option.doc


@each_option
def test_the_default_is_what_the_declaration_takes(option):
    option.check(option.default)
    assert load(option.key, option.default)[option.key] == option.default
    if not (option.is_list and option.type is str):
        assert load(option.key, str(option.default))[option.key] == option.default


@each_option
def test_defaults_are_copied(option):
    if option.is_list:
        cfg = dn.load_config()
        for name in option.key.split("."):
            cfg = cfg[name]
        cfg.append(cfg[0] if cfg else option.type())
        assert load()[option.key] == option.default != cfg


def outside(allowed):
    if isinstance(allowed, Range):
        below = allowed.above if allowed.above > -math.inf else allowed.min - 1
        values = (below, allowed.max + 1, allowed.limit + 1, -math.inf, math.inf, math.nan)
        yield from (value for value in values if value == value)
    elif allowed is not None:
        yield from (f"{allowed[0]}x", " ") if isinstance(allowed[0], str) else (allowed[0] + 0.5, -1.0)


@each_option
def test_values_outside_of_choices_and_range_are_refused(option):
    for value in outside(option.allowed):
        typed = int(value) if option.type is int and math.isfinite(value) else value
        assert f"{option.key} takes " in refused(option.key, [typed] if option.is_list else typed)
    if option.type is float and isinstance(option.allowed, Range):
        assert "takes a number" in refused(option.key, [math.nan] * 9 if option.is_list else math.nan) or option.length


@each_option
def test_every_number_has_a_range(option):
    """With both ends, so that no number overflows in what is computed from it."""
    if option.type in (int, float) and not isinstance(option.allowed, tuple):
        assert isinstance(option.allowed, Range)
        if option.key != "SOLVER.BASE_LR":  # what it makes of weights is looked at in each step
            assert min(option.allowed.max, option.allowed.limit) <= 2**32
        least = -1 if option.key == "DATALOADER.NUM_WORKERS" else 0  # -1: by the machine
        assert max(option.allowed.min, option.allowed.above) >= least


@each_option
def test_values_of_another_type_are_refused(option):
    wrong = [None, "None", "null", {"a": 1}, object, [["a"]], [None]]
    wrong += [1j, True] if option.type is not bool else [1, 0.0]
    wrong += ["x"] if option.type is not str else [3, [3]]
    wrong += [0.5] if option.type is int else []
    for value in wrong:
        assert f"{option.key} takes " in refused(option.key, value), value


def test_a_range_says_what_it_is():
    assert [str(r) for r in (Range(above=0), Range(min=1), Range(min=0, max=1), Range(above=0, max=1))] == [
        *("above 0", "from 1 on", "from 0 to 1", "above 0, up to 1"),
    ]
    assert all(value not in Range(min=0) for value in (math.inf, math.nan, -1))
    limited = Range(above=0, limit=9)
    assert [limited.expected(value) for value in (0, 10, math.inf)] == ["above 0", "up to 9", "above 0"]
    assert 9 in limited and 10 not in limited


def test_a_section_declares_its_options(monkeypatch):
    monkeypatch.setattr(Section, "options", {})
    monkeypatch.setattr(Section, "sections", {})

    class Example(Section, key="A.B", used_by=("RetinaNet",)):
        NEW = Option(1, "A number.", renamed_from="OLD")
        OTHER = Option([], "Of one.", used_by=("Classifier",))

    assert list(Section.options) == ["A.B.NEW", "A.B.OTHER"] and Section.sections == {"A.B": Example}
    new, other = Section.options.values()
    assert (new.key, new.renamed_from, new.used_by, new.type) == ("A.B.NEW", "A.B.OLD", ("RetinaNet",), int)
    assert (other.used_by, other.type, other.is_list) == (("Classifier",), str, True)


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("TEST.STATISTICS", "[population, minibatch]", ["population", "minibatch"]),
        ("TEST.STATISTICS", "['population', 'minibatch']", ["population", "minibatch"]),
        ("TEST.STATISTICS", "('population',)", ["population"]),
        ("TEST.STATISTICS", "minibatch", ["minibatch"]),
        ("DATASETS.TRAIN", "[a.json:imgs, b.json:imgs]", ["a.json:imgs", "b.json:imgs"]),
        ("DATASETS.TRAIN", " [ a.json:imgs,b.json:imgs, ] ", ["a.json:imgs", "b.json:imgs"]),
        ("DATASETS.TRAIN", "[my set#1.json:my images, 'b: c #2']", ["my set#1.json:my images", "b: c #2"]),
        ("DATASETS.TRAIN", '["null", "3", "[x]"]', ["null", "3", "[x]"]),
        ("DATASETS.TRAIN", "a.json:imgs", ["a.json:imgs"]),
        ("DATASETS.TRAIN", "my set: final #2.json:imgs", ["my set: final #2.json:imgs"]),
        ("DATASETS.TRAIN", "a, b", ["a, b"]),
        ("DATASETS.TRAIN", "true", ["true"]),
        ("DATASETS.TRAIN", "", [""]),
        ("DATASETS.TRAIN", "[]", []),
        ("DATASETS.TRAIN", "[2020_val, a-b]", ["2020_val", "a-b"]),
        ("INPUT.MIN_SIZE_TRAIN", "[ 640, 800 ]", [640, 800]),
        ("MODEL.RETINANET.IOU_THRESHOLDS", "[0.5, 1]", [0.5, 1.0]),
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[1e-4]", [1e-4]),
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", ["1e-4"], [1e-4]),
        ("SOLVER.STEPS", "(1, 2)", [1, 2]),
        ("SOLVER.STEPS", "[]", []),
        ("SOLVER.BASE_LR", "1e-4", 1e-4),
        ("SOLVER.BASE_LR", "2", 2.0),
        ("SOLVER.BASE_LR", ".5", 0.5),
        ("SOLVER.MAX_ITER", "1_000", 1000),
        ("SOLVER.AMP.ENABLED", "true", True),
        ("SOLVER.AMP.ENABLED", "True", True),
        ("SOLVER.AMP.ENABLED", "FALSE", False),
        ("OUTPUT_DIR", "runs/#1: a [b] {c}", "runs/#1: a [b] {c}"),
        ("OUTPUT_DIR", "12", "12"),
        ("OUTPUT_DIR", "", ""),
    ],
)
def test_text_is_read_as_in_yaml_and_python(key, text, value, tmp_path):
    found = load(key, text)[key]
    assert found == value and type(found) is type(value)
    save_config(dn.load_config(None, [key, text]), tmp_path / "config.yaml")
    assert flatten(dn.load_config(tmp_path / "config.yaml"))[key] == value


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("DATASETS.TRAIN", "[a.json: imgs]", "a colon before a space makes a mapping"),
        ("DATASETS.TRAIN", "{a: b}", "a colon before a space makes a mapping"),
        ("DATASETS.TRAIN", "[a, b", "put quotes around names"),
        ("DATASETS.TRAIN", "[a #1, b]", "put quotes around names"),
        ("DATASETS.TRAIN", "[2020-13-45]", "put quotes around names"),
        ("DATASETS.TRAIN", "[*.json]", "put quotes around names"),
        ("DATASETS.DOMAINS", "[yes, no]", "put quotes around names"),
        ("DATASETS.DOMAINS", "[3, 4]", "put quotes around names"),
        ("DATASETS.DOMAINS", "3", "put quotes around names"),
        ("DATASETS.TRAIN", "[null, a]", r"leave it out for its default, \[\]"),
        ("DATASETS.TRAIN", "[" * 3000, "DATASETS.TRAIN takes a list"),
        ("SOLVER.STEPS", "[1, x]", "takes a list such as [0], got '[1, x]' (list)"),
        ("SOLVER.STEPS", "{}", "takes a list such as [0], got '{}' (dict)"),
        ("SOLVER.BASE_LR", "fast", "takes float (such as 0.01), got 'fast' (str)"),
        ("SOLVER.AMP.ENABLED", "yes", "takes bool (such as False), got 'yes' (str)"),
        ("SOLVER.MAX_ITER", "None", "takes int (such as 90000), got 'None' (NoneType); leave it out"),
        ("MODEL.WEIGHTS", "None", "takes str (such as ''), got 'None' (NoneType); leave it out for its default, ''"),
    ],
)
def test_text_that_is_something_else(key, text, message):
    found = refused(key, text)
    assert found.startswith(f"overrides: {key} takes ") and message.replace("\\", "") in found


def test_floats_without_a_point_in_files(tmp_path):
    (tmp_path / "c.yaml").write_text("SOLVER: {BASE_LR: 1e-4}\nMODEL: {RPN: {IOU_THRESHOLDS: [1e-4, 1]}}")
    cfg = dn.load_config(tmp_path / "c.yaml")
    assert cfg.SOLVER.BASE_LR == 1e-4 and cfg.MODEL.RPN.IOU_THRESHOLDS == [1e-4, 1.0]


# ---- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("MODEL.RPN.NMS_TRESH", "MODEL.RPN.NMS_THRESH"),
        ("TEST.RECOMPUTE.NUM_SAMPLE", "TEST.RECOMPUTE.NUM_SAMPLES"),
        ("MODEL.NORM.GHOST.SAMPLES_PER_GROUP", "MODEL.NORM.GHOSTBN.SAMPLES_PER_GROUP"),
        ("MODEL.NORM.GHOSTBN.GROUPSIZE", "MODEL.NORM.GHOSTBN.SAMPLES_PER_GROUP"),
        ("MODEL.NORM.GBGN.EXAMPLE_PER_GROUP", "MODEL.NORM.GBGN.SAMPLES_PER_GROUP"),
        ("SOLVER.AMP", "SOLVER.AMP.DTYPE"),
    ],
)
def test_unknown_keys_name_the_nearest(key, nearest):
    assert refused(key, 1) == f"overrides: unknown key {key}; the nearest known key is {nearest}"


def test_the_renamed_keys():
    assert {old.removeprefix("MODEL.NORM."): new.removeprefix("MODEL.NORM.") for old, new in RENAMED.items()} == {
        "GHOSTBN.GROUP_SIZE": "GHOSTBN.SAMPLES_PER_GROUP",
        "SEQNORM.CHANNEL_GROUPS": "SEQNORM.NUM_CHANNEL_GROUPS",
        "SEQNORM.BATCH_GROUPS": "SEQNORM.NUM_SAMPLE_GROUPS",
        "GBGN.CHANNEL_GROUPS": "GBGN.NUM_CHANNEL_GROUPS",
        "GBGN.EXAMPLES_PER_GROUP": "GBGN.SAMPLES_PER_GROUP",
        "BRN.GROUP_SIZE": "BRN.SAMPLES_PER_GROUP",
    }


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_key_is_accepted_with_one_warning(old, caplog):
    new = RENAMED[old]
    assert load(old, 2) == load(new, 2)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.getMessage() == f"overrides: renamed keys: {old} is now {new}"
    assert f"{old} and {new} are names of the same option; give {new} alone" in refused(old, 2, new, 2)
    assert f"{new} takes int" in refused(old, "x")


def old_tree():
    """The config of an old output folder."""
    tree = yaml.safe_load(dn.load_config().dump())
    for old, new in RENAMED.items():
        *_, section, name = new.split(".")
        tree["MODEL"]["NORM"][section][old.rpartition(".")[2]] = tree["MODEL"]["NORM"][section].pop(name) + 1
    return tree


def test_the_config_of_an_old_output_folder(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old_tree()))
    cfg = dn.load_config(tmp_path / "config.yaml", ["MODEL.NORM.GHOSTBN.SAMPLES_PER_GROUP", 4])
    assert cfg.MODEL.NORM.GHOSTBN.SAMPLES_PER_GROUP == 4 and cfg.MODEL.NORM.SEQNORM.NUM_SAMPLE_GROUPS == 9
    (record,) = caplog.records
    assert all(f"{old} is now {new}" in record.getMessage() for old, new in RENAMED.items())


def test_a_new_key_over_the_old_one_of_a_base_file(tmp_path):
    (tmp_path / "base.yaml").write_text("MODEL: {NORM: {BRN: {GROUP_SIZE: 8, MOMENTUM: 0.5}}}")
    (tmp_path / "top.yaml").write_text("_BASE_: base.yaml\nMODEL: {NORM: {BRN: {SAMPLES_PER_GROUP: 4}}}")
    renorm = dn.load_config(tmp_path / "top.yaml").MODEL.NORM.BRN
    assert (renorm.SAMPLES_PER_GROUP, renorm.MOMENTUM) == (4, 0.5)


def test_a_mistake_in_a_base_file_names_that_file(tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER: {BASE_LRR: 1}")
    (tmp_path / "top.yaml").write_text("_BASE_: base.yaml")
    with pytest.raises(dn.UserError, match=r"base\.yaml: unknown key SOLVER\.BASE_LRR"):
        dn.load_config(tmp_path / "top.yaml")


# ---- explain -------------------------------------------------------------------------------------------------------


@each_option
def test_every_option_is_explained(option):
    lines = explain(option.key).splitlines()
    assert lines[0] == option.key and lines[1] == f"  {option.doc}" and f"  default: {option.default!r}" in lines
    assert sum(line.startswith(("  range: ", "  choices: ")) for line in lines) == (option.allowed is not None)
    section = option.key.rpartition(".")[0]
    assert f"{option.key}: {option.default!r}  # {option.doc}" in explain(section).splitlines()


def test_what_is_explained():
    assert explain("MODEL.NORM.GHOSTBN.GROUP_SIZE") == explain("MODEL.NORM.GHOSTBN.SAMPLES_PER_GROUP")
    assert "  old name: MODEL.NORM.GHOSTBN.GROUP_SIZE" in explain("MODEL.NORM.GHOSTBN.SAMPLES_PER_GROUP").splitlines()
    assert "  length: 1 or more" in explain("TEST.STATISTICS") and "  type: list of str" in explain("TEST.STATISTICS")
    assert "  used by: RetinaNet" in explain("MODEL.RETINANET.NORM").splitlines()
    assert sum(line.startswith("MODEL.") for line in explain("MODEL").splitlines()) > 60
    assert len(explain().splitlines()) == len(OPTIONS) and explain("MODEL.NORM").count("MODEL.NORM.") == sum(
        key.startswith("MODEL.NORM.") for key in OPTIONS
    )
    with pytest.raises(dn.UserError, match=r"unknown key SOLVER\.LR; the nearest known key is SOLVER"):
        explain("SOLVER.LR")


def test_the_command(capsys):
    assert explain_tool.main(["SOLVER.BASE_LR"]) == 0 and explain_tool.main([]) == 0
    out, err = capsys.readouterr()
    assert out == f"{explain('SOLVER.BASE_LR')}\n{explain()}\n" and err == ""
    for argv in (["SOLVER.BSE_LR"], ["MODEL.RETINANETS"], ["SEED", "1"], ["--key", "SEED"]):
        assert explain_tool.main(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: ")
    assert explain_tool.main(["MODEL.RETINANETS"]) == 2 and "MODEL.RETINANET" in capsys.readouterr().err


def test_the_config_needs_no_torch():
    """The subpackage, without the `__init__` of domainnorm, which may import torch."""
    code = (
        "import sys, types; package = types.ModuleType('domainnorm'); package.__path__ = [sys.argv[1]];"
        "sys.modules['domainnorm'] = package; from domainnorm.config import load_config; load_config();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(ROOT / "domainnorm")], timeout=60).returncode == 0
