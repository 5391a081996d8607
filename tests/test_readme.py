"""The front page: short, its paths exist, and its results are those of the studies. test_docs.py runs its code."""

import re
from pathlib import Path

from domainnorm.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert lines.index("```python") < 85


def test_the_paths_it_names_exist():
    paths = re.findall(r"(?:tools|configs|docs|domainnorm|examples)/[\w./]+", README)
    paths += [link.partition("#")[0] for link in re.findall(r"\]\((?!http)([^)]+)\)", README)]
    assert len(paths) > 20
    for path in paths:
        if not path.startswith("docs/_build"):
            assert (ROOT / path.rstrip(".")).exists(), path


def test_its_results_are_those_of_the_studies():
    section = README.partition("\n## Results")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    reports = "".join((ROOT / "docs" / "studies" / f"{name}.md").read_text() for name in ("table5", "table6", "shift"))
    assert len(rows) > 20
    assert [row for row in rows if row not in reports] == []


def test_each_training_it_shows_has_a_folder_of_its_own():
    """A second one in the same folder is refused."""
    folders = []
    for command in re.findall(r"train_net\.py ((?:.*\\\n)*.*)", README):
        own = re.search(r"OUTPUT_DIR (\S+)", command)
        folders.append(own[1] if own else load_config(ROOT / re.search(r"configs/\S+yaml", command)[0]).OUTPUT_DIR)
    assert len(folders) == len(set(folders)) > 1, folders
