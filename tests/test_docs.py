"""The code in docs/ runs, and does what is said of it."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import domainnorm as dn
from domainnorm.config.schema import OPTIONS

DOCS = Path(__file__).parents[1] / "docs"


def run(file):
    names: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", (DOCS / file).read_text(encoding="utf-8"), re.S):
        exec(compile(snippet, file, "exec"), names)
    return names


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


def test_the_audit_names_what_was_never_updated():
    finding = run("audit.md")["report"].findings[0]
    assert (finding.check, finding.kind, finding.layers) == ("frozen", "never updated", ["1"])
