"""The documentation as a site: it builds without a warning, and its reference is complete."""

import re
import subprocess
import sys

import pytest
import tiny
from snippets import ROOT

import domainnorm as dn
from domainnorm.cli import COMMANDS
from domainnorm.config.schema import OPTIONS, SECTIONS
from domainnorm.engine.describe_data import draw_data

REFERENCE = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, as the command of the README builds it."""
    pytest.importorskip("sphinx")
    for name in ("myst_parser", "pydata_sphinx_theme", "sphinx_copybutton", "sphinx_design"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_every_option_is_on_the_page_of_config_keys(site):
    page = (site / "reference" / "config.html").read_text(encoding="utf-8")
    for key, option in OPTIONS.items():
        assert f'id="{re.sub("[._]", "-", key.lower())}"' in page, key
        assert f">{key.rpartition('.')[2]}<" in page
        assert option.doc.split()[0] in page
    for section in SECTIONS:
        assert f"<h2>{section or 'At the top'}<" in page
    assert "[`" not in page and "{#" not in page  # Markdown that was not understood


@pytest.mark.slow
def test_every_tool_has_its_help(site):
    page = (site / "reference" / "tools.html").read_text(encoding="utf-8")
    for command in set(COMMANDS) - {"eval"}:
        assert f"usage: domainnorm {command} " in page
    assert "--config-file FILE" in page and "--minutes MINUTES" in page and "<!-- help" not in page


def test_every_tool_is_on_the_page_of_tools():
    page = (REFERENCE / "tools.md").read_text(encoding="utf-8")
    for command in set(COMMANDS) - {"eval"}:
        assert f"<!-- help of domainnorm {command} -->" in page
    scripts = [file for file in ROOT.glob("tools/**/*.py") if "__main__" in file.read_text(encoding="utf-8")]
    for file in [*scripts, *ROOT.glob("tools/*.sh")]:
        assert f"`{file.relative_to(ROOT)}`" in page or f"## {file.relative_to(ROOT)}\n" in page, file


def test_every_public_name_is_in_the_reference_once():
    text = "\n".join(file.read_text(encoding="utf-8") for file in REFERENCE.glob("*.md"))
    named = re.findall(r"^\.\. auto(?:class|function|exception):: (\w+)", text, re.M)
    assert len(named) == len(set(named))
    assert set(dn.__all__) - set(named) == {"__version__"}


# What a row of docs/reference/output_files.md is about, if not a run such as the one here.
ELSEWHERE = ("classification_results.json", ".lock", "predictions.json", "pictures/IMAGE.jpg")


@pytest.mark.slow
def test_a_run_writes_the_files_that_are_documented(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[dn.train.__module__], "draw_data", draw_data)  # which conftest.py leaves out
    page = (REFERENCE / "output_files.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \|", page, re.M)
    data = {name: tiny.write_dataset(tmp_path / name) for name in ("train", "val", "test")}
    chosen: dict[str, object] = {
        "DATASETS__TEST": [data["test"]],
        "SOLVER__MAX_ITER": 2,
        "SOLVER__CHECKPOINT_PERIOD": 1,
        "SOLVER__AVERAGE_WEIGHTS": "EMA",
        "TEST__EVAL_PERIOD": 1,
        "TEST__STATISTICS": ["population"],
        "TEST__RECOMPUTE__NUM_SAMPLES": 8,
        "TEST__EXAMPLE_WEIGHTS": [0.0, 0.5],
        "TEST__EXAMPLE_WEIGHT_DATASET": data["val"],
        "TEST__REPORT": True,
    }
    out = tmp_path / "out"
    dn.train(tiny.config(data["train"], out, **tiny.MASK_RCNN, **chosen))
    written = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    patterns = {}
    for row in rows:
        pattern = re.sub("NUMBER|STATISTICS|FIGURE", "[^/]+", re.escape(row))
        patterns[row] = pattern.replace("ITERATION", r"\d{7}")
    assert len(written) > 15
    for file in written:
        assert [row for row in rows if re.fullmatch(patterns[row], file)], f"{file} has no row"
    for row in rows:
        found = any(re.fullmatch(patterns[row], file) for file in written)
        assert found != row.endswith(ELSEWHERE), row
