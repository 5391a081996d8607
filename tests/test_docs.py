"""The code in Markdown pages runs, and does what is said of it."""

import doctest
import inspect
import re

import pytest
import torch
from PIL import Image
from snippets import PAGES, ROOT, blocks, check_command, check_yaml, commands, run_page
from torch import nn

import domainnorm as dn
from domainnorm.config.schema import OPTIONS
from domainnorm.data import CocoDataset

DOCS = ROOT / "docs"
MAX_NOT_RUN = 5  # blocks: a page that cannot be run should be written anew


def pages():
    """Those with code that runs, the slow ones marked."""
    for page in PAGES:
        own = [block for block in blocks(page) if block.runs]
        if own:
            marks = [pytest.mark.slow] * any("slow" in block.mark for block in own)
            yield pytest.param(page, id=page.relative_to(ROOT).as_posix(), marks=marks)


@pytest.mark.parametrize("page", pages())
def test_the_code_of_a_page_runs_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_tells_to_type_exists(page):
    """Tools, options, configs and keys of its commands, keys of its YAML, files; and its Python compiles."""
    for block in blocks(page):
        try:
            if block.language in ("bash", "sh") and not block.skipped:
                for words in commands(block.code):
                    check_command(words)
            elif block.language == "yaml" and not block.skipped:
                check_yaml(block.code)
            elif block.language == "python":
                compile(block.code, block.place, "exec")
        except (AssertionError, dn.UserError) as error:
            raise AssertionError(f"{block.place}: {error}") from error
    folders = "tools|configs|docs|domainnorm|examples|tests"
    for path in re.findall(rf"`((?:{folders})/[\w./]+)`", page.read_text(encoding="utf-8")):
        known = any((folder / path).exists() for folder in (ROOT, ROOT / "tests"))  # papers.md has tests by the latter
        assert known or page.parent.name == "migration", path  # whose tables have files of other projects


def test_few_blocks_are_not_run_and_say_why():
    skipped = [block for page in PAGES for block in blocks(page) if block.skipped]
    assert len(skipped) <= MAX_NOT_RUN, [block.place for block in skipped]
    for page in PAGES:
        for block in blocks(page):
            known = {"", "run", "slow", "run, slow"}
            assert block.mark in known or re.fullmatch(r"not run: \w.{9,}", block.mark), f"{block.place}: {block.mark}"


def test_mistakes_in_commands_are_found():
    for command, said in {
        "python tools/train_nets.py --config-file configs/quickstart.yaml": "no tools/train_nets.py",
        "python tools/train_net.py --config-file configs/quickstart.yaml --gpus 2": "--gpus",
        "domainnorm train --config-file configs/quickstart.yaml MODEL.BACKBONE.NAMES a": "MODEL.BACKBONE.NAMES",
        "domainnorm train --config-file output/a/config.yaml MODEL.BACKBONE.NAMES a": "MODEL.BACKBONE.NAMES",
        "for n in 1 2; do domainnorm train --config-file configs/quick.yaml; done": "quick.yaml",
        "A=1 torchrun --nproc-per-node 2 tools/train_net.py --resume": "--config-file",
        "python tools/stress.py layer && ls": "layer",
        "python examples/own_model.py --steps 3": "--steps",
    }.items():
        with pytest.raises((AssertionError, dn.UserError), match=said):
            for words in commands(command):
                check_command(words)
    with pytest.raises(AssertionError, match=r"SOLVER\.LR"):
        check_yaml("SOLVER:\n  LR: 0.1\n")
    check_yaml("services:\n  LR: 0.1\n")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a page; the names that its Python blocks leave."""
    monkeypatch.chdir(tmp_path)
    return lambda file: run_page(DOCS / file, tmp_path)


PUBLIC = [name for name in dn.__all__ if callable(getattr(dn, name))]
SECTIONS = ("Args", "Attributes", "Shape", "Returns", "Raises", "Example")


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings_have_their_sections_in_order(name):
    value = getattr(dn, name)
    text = inspect.getdoc(value)
    assert re.search(r"[.`]$", text.split("\n\n")[0])  # a sentence first
    found = re.findall(rf"^({'|'.join(SECTIONS)}):", text, re.M)
    assert found == sorted(found, key=SECTIONS.index) and "Example" in found
    if isinstance(value, type) and issubclass(value, nn.Module):
        assert {"Args", "Shape"} <= set(found)
    elif not isinstance(value, type):
        assert "Returns" in found and ("Args" in found or not inspect.signature(value).parameters)


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_of_public_docstrings_run(name):
    torch.manual_seed(0)
    names = {"dn": dn, "torch": torch, "nn": nn}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    examples = doctest.DocTestFinder(recurse=False).find(getattr(dn, name), name, globs=names)
    assert examples and examples[0].examples
    assert runner.run(examples[0], out=print).failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings_name_every_argument(name):
    value = getattr(dn, name)
    text = inspect.getdoc(value)
    function = value.__init__ if isinstance(value, type) else value
    without = name == "UserError" or function is object.__init__
    own = [] if without else list(inspect.signature(function).parameters.values())
    for argument in own[1:] if isinstance(value, type) else own:
        star = {argument.VAR_POSITIONAL: r"\*", argument.VAR_KEYWORD: r"\*\*"}.get(argument.kind, "")
        assert re.search(rf"^    (\w+, )*{star}{argument.name}(, \w+)*:", text, re.M), argument.name


def test_everything_that_papers_md_names_exists():
    text = (DOCS / "papers.md").read_text(encoding="utf-8")
    words = re.findall(r"`([^`\n]+)`", text)
    kinds = {"dn.": [], "paper/": [], "test_": [], "key": []}
    for word in words:
        if word.startswith("dn."):
            kinds["dn."].append(word)
            assert hasattr(dn, word.removeprefix("dn.")), word
        elif word.startswith("paper/") and word.endswith(".yaml"):
            kinds["paper/"].append(word)
            assert (DOCS.parent / "configs" / word).is_file(), word
        elif re.fullmatch(r"(?!tests/)\w+/test_\w+\.py", word):
            kinds["test_"].append(word)
            assert (DOCS.parent / "tests" / word).is_file(), word
        elif re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+", word):
            kinds["key"].append(word)
            assert word in OPTIONS, word
    assert min(map(len, kinds.values())) > 15
    named = {*kinds["paper/"], *(f"paper/table5/row{k}.yaml" for k in range(1, 7))}
    for file in (DOCS.parent / "configs" / "paper").rglob("*.yaml"):
        own = file.relative_to(DOCS.parent / "configs").as_posix()
        is_base = "base" in file.stem or file.stem.startswith(("schedule", "baseline")) or file.stem.endswith("_1x")
        assert own in named or is_base, own


def test_the_audit_names_what_was_never_updated(run):
    finding = run("audit.md")["report"].findings[0]
    assert (finding.check, finding.kind, finding.layers) == ("frozen", "never updated", ["1"])


def test_the_table_of_the_tutorial_becomes_coco(run, tmp_path):
    names = run("tutorials/own_data.md")
    (tmp_path / "photos").mkdir()
    lines = ["file,class,x1,y1,x2,y2"]
    for k in range(10):
        Image.new("RGB", (60, 40)).save(tmp_path / "photos" / f"{k}.png")
        lines += [f"{k}.png,a,{k},2,30,20", f"{k}.png,b,40,10,60,40.5"]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    names["convert"]("labels.csv", "photos", ["a", "b"])
    train, val = (CocoDataset(f"{name}.json:photos") for name in ("train", "val"))
    assert (len(train), len(val)) == (8, 2) and train.class_names == ["a", "b"]
    assert not {record.file_name for record in train.records} & {record.file_name for record in val.records}
    assert val[0][1]["boxes"].tolist()[1] == [40, 10, 60, 40] and val[0][1]["labels"].tolist() == [0, 1]
    (tmp_path / "labels.csv").write_text("\n".join([*lines, "3.png,c,1,1,5,5"]))
    with pytest.raises(ValueError, match=r"'c' is none of \['a', 'b'\]: .*3.png"):
        names["convert"]("labels.csv", "photos", ["a", "b"])
