"""The README's snippets run, its commands name files that exist."""

import re
import shlex
from pathlib import Path

import pytest

from domainnorm.cli import export, predict
from domainnorm.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_python_snippets_run_in_order(monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) >= 3
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert [level.shape[2:] for level in names["levels"]] == [(64 >> k, 80 >> k) for k in range(5)]
    assert {"boxes", "scores", "labels"} <= names["detections"][0].keys()


def test_the_paths_it_names_exist():
    paths = re.findall(r"(?:tools|configs|docs|domainnorm|examples)/[\w./]+", README)
    assert len(paths) > 4
    for path in paths:
        assert (ROOT / path.rstrip(".")).exists(), path


def test_what_it_predicts_and_exports_are_arguments_of_these_commands():
    commands = [shlex.split(line.replace("\\\n", "")) for line in re.findall(r"tools/((?:.*\\\n)*.*)", README)]
    parsers = {"predict.py": predict.parse, "export_net.py": export.parse}
    args = [parsers[words[0]](words[1:]) for words in commands if words[0] in parsers and "--out" in words]
    assert [hasattr(found, "input") for found in args].count(True) == 1 and len(args) == 3
    assert sum(found.boxes for found in args if hasattr(found, "boxes")) == 1
    for found in args:
        if hasattr(found, "config_file") and (ROOT / (found.config_file or "-")).exists():
            load_config(ROOT / found.config_file, found.opts)


def test_each_training_it_shows_has_a_folder_of_its_own():
    """A second one in the same folder is refused."""
    folders = []
    for command in re.findall(r"train_net\.py ((?:.*\\\n)*.*)", README):
        if (
            "--eval-only" not in command
            and "--resume" not in command
            and (file := re.search(r"configs/\S+yaml", command))
        ):
            own = re.search(r"OUTPUT_DIR (\S+)", command)
            folders.append(own[1] if own else load_config(ROOT / file[0]).OUTPUT_DIR)
    assert len(folders) > 5
    assert len(folders) == len(set(folders)), folders
