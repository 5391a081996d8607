"""The pages of docs/layers, docs/how_to and docs/migration: drawings, snippets, commands and names."""

import itertools
import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

import domainnorm as dn
from domainnorm.cli import analyze, audit, explain, export, predict, show, train
from domainnorm.config import load_config
from domainnorm.config.schema import OPTIONS

DOCS = Path(__file__).parents[1] / "docs"
DRAWINGS = runpy.run_path(str(DOCS / "drawings.py"))
TOOLS = {"train_net.py": "train", "audit_net.py": "audit", "export_net.py": "export", "predict.py": "predict"}
TOOLS |= {"show_data.py": "show", "analyze_net.py": "analyze", "explain.py": "explain"}
PARSERS = {tool.__name__.rpartition(".")[2]: tool.parse for tool in (analyze, audit, export, predict, show, train)}
PARSERS |= {"eval": train.parse, "explain": explain.main}
SAMPLES, CHANNELS = DRAWINGS["SAMPLES"], DRAWINGS["CHANNELS"]


def test_the_drawings_are_those_of_the_script(tmp_path):
    DRAWINGS["main"]([str(tmp_path)])
    drawn = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert drawn == {file.name: file.read_bytes() for file in (DOCS / "layers" / "drawings").iterdir()}


@pytest.mark.parametrize("name", DRAWINGS["BLOCKS"])
def test_what_is_drawn_together_is_normalized_together(name):
    """An output depends on the inputs of its normalization batch and on no others; halves of a map are two pieces."""
    samples, channels, norm, options = DRAWINGS["BLOCKS"][name]
    torch.manual_seed(0)
    layer = dn.get_norm(norm, CHANNELS, affine=None, **options).double()
    x = torch.randn(SAMPLES, CHANNELS, 2, 2, dtype=torch.double, requires_grad=True)
    layer(x)[0, 0, 0, 0].backward()
    expected = torch.zeros(SAMPLES, CHANNELS * 4, dtype=torch.bool)
    expected[:samples, : round(channels * 4)] = True
    assert torch.equal(x.grad.flatten(1) != 0, expected)


PAGES = [path for folder in ("layers", "how_to", "migration") for path in sorted((DOCS / folder).glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


SLOW = {"another_domain", "fine_tuning_forgets", "frozen_backbone", "small_batch"}


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page.stem in SLOW else []) for page in PAGES],
    ids=lambda page: f"{page.parent.name}/{page.stem}",
)
def test_snippets_run_in_order(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    for snippet in blocks(page, "python"):
        exec(compile(snippet, page.name, "exec"), names)
    if page.parent.name == "layers":
        assert names


@each_page
def test_commands_are_those_of_the_tools(page):
    """Their arguments are parsed, their configs loaded with the keys and values that they name."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["domainnorm"]:
                tool, words = words[1], words[2:]
            elif words[:1] == ["python"] and words[1].startswith("tools/"):
                assert (DOCS.parent / words[1]).is_file(), line
                tool, words = TOOLS[Path(words[1]).name], words[2:]
            else:
                raise AssertionError(f"{page.name}: neither a tool nor domainnorm: {line}")
            args = PARSERS[tool](words)
            file = getattr(args, "config_file", None)
            if file:
                config = load_config(DOCS.parent / file, getattr(args, "opts", None) or getattr(args, "what", []))
                assert config.OUTPUT_DIR


def ours(page):
    """The text of a page without what tables of docs/migration have of others: their first column."""
    lines, foreign = [], False
    for before, line in itertools.pairwise(["", *page.read_text(encoding="utf-8").splitlines()]):
        if line.startswith("|"):
            if not before.startswith("|"):  # the head of a table
                foreign = page.parent.name == "migration" and not line.startswith("| key ")
            line = line.split("|", 2)[2] if foreign else line
        lines.append(line)
    return "\n".join(lines)


@each_page
def test_the_names_exist(page):
    text = ours(page)
    for name in re.findall(r"\bdn\.(\w+)", text):
        assert name in dn.__all__, name
    keys = re.findall(r"`((?:MODEL|SOLVER|TEST|INPUT|DATASETS|DATALOADER)(?:\.[A-Z0-9_]+)*)(?: (\w+)`)?", text)
    for key, value in keys:
        assert key in OPTIONS or any(option.startswith(key + ".") for option in OPTIONS), key
        if value and isinstance(choices := OPTIONS[key].allowed, tuple):
            assert value in map(str, choices), (key, value)
    for file in re.findall(r"\b(?:tools|configs|examples)/[\w/]+\.(?:py|yaml)", text):
        assert (DOCS.parent / file).is_file(), file


def test_the_findings_exist():
    """Written as `check: kind`."""
    checks = Path(dn.__file__).parent / "auditing" / "checks"
    found = [words for page in PAGES for words in re.findall(r"`([a-z_]+): ([^`]+)`", page.read_text(encoding="utf-8"))]
    assert len(found) > 10
    for check, kind in found:
        assert f'"{check}"' in (source := "".join(path.read_text(encoding="utf-8") for path in checks.glob("*.py")))
        assert f'"{kind}"' in source, (check, kind)


@each_page
def test_the_names_of_others_exist(page):
    """Of the libraries that are installed, where they are written in full."""
    for library in ("torchvision", "timm", "fvcore"):
        for name in re.findall(rf"`({library}(?:\.\w+)+)", page.read_text(encoding="utf-8")):
            assert pkgutil.resolve_name(name) is not None, name
