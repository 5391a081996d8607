"""The files for contributors say what the code, setup.py and each other say."""

import re
import runpy
from pathlib import Path
from unittest import mock

import pytest
import yaml

import domainnorm as dn
from domainnorm.config import RENAMED

ROOT = Path(__file__).parents[1]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def declared():
    """The arguments of setup()."""
    arguments = {}
    with mock.patch("setuptools.setup", arguments.update):
        runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def sections(text, level):
    """Heading -> what is below it."""
    found = re.split(rf"^{'#' * level} (.+)\n", text, flags=re.M)
    return dict(zip(found[1::2], found[2::2], strict=True))


def test_the_changelog_has_this_version():
    versions = sections(read("CHANGELOG.md"), 2)
    unreleased, newest, *_ = versions
    assert unreleased == "Unreleased"
    assert re.fullmatch(rf"{re.escape(dn.__version__)} - \d{{4}}-\d\d-\d\d", newest)
    for text in versions.values():
        kinds = list(sections(text, 3))
        assert kinds == [k for k in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security") if k in kinds]


def test_the_changelog_names_what_exists():
    text = read("CHANGELOG.md")
    for name in re.findall(r"`dn\.(\w+)", text):
        assert hasattr(dn, name), name
    for path in re.findall(r"`((?:docs|configs|examples)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


def test_the_changelog_names_what_is_deprecated():
    """Each old name is in the table of one version, with its new name."""
    rows = re.findall(r"^\| (.+?) \| (`.+?) \| (.+?) \|$", read("CHANGELOG.md"), re.M)
    listed = {
        (place, old, new)
        for place, olds, news in rows
        for old, new in zip(olds.split(", "), news.split(", "), strict=True)
    }
    layers = {name: getattr(dn, name) for name in dn.__all__ if isinstance(getattr(dn, name), type)}
    expected = {
        (f"`dn.{name}`", f"`{old}`", f"`{new}`")
        for name, layer in layers.items()
        for old, new in vars(layer).get("_renamed", {}).items()
    }
    assert listed == expected | {("a config", f"`{old}`", f"`{new}`") for old, new in RENAMED.items()}
    assert len(expected) >= 7


def test_the_citation_is_of_this_version_and_of_the_five_papers():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"], citation["type"]) == (dn.__version__, "Apache-2.0", "software")
    assert f"{dn.__version__} - {citation['date-released']}" in sections(read("CHANGELOG.md"), 2)
    titles = [paper["title"] for paper in citation["references"]]
    for paper in citation["references"]:
        assert paper["type"] in ("article", "conference-paper") and paper["url"].startswith("https://arxiv.org/abs/")
        assert all(author.keys() == {"family-names", "given-names"} for author in paper["authors"])
    headings = "\n".join(sections(read("docs/papers.md"), 2))
    assert len(titles) == 5
    for title in titles:
        assert title.split(":")[0].removeprefix("A New Look at ") in headings


def test_each_supported_python_and_the_oldest_torch_are_tested(declared):
    supported = [c.rpartition(" ")[2] for c in declared["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert declared["python_requires"] == f">={supported[0]}"
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    job = workflow["jobs"]["run"]
    assert job["strategy"]["matrix"]["python"] == supported
    assert {"run": ".ci/run"} in job["steps"]
    required = dict(line.split(">=") for line in declared["install_requires"] if ">=" in line)
    for package in ("torch", "torchvision"):
        for file in (".github/workflows/ci.yml", "tools/test_versions.sh"):
            assert f"{package}=={required[package]}.*" in read(file), file


def test_forms_for_issues_are_forms():
    files = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(files) >= 2
    for file in files:
        form = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys()
        identifiers = [field["id"] for field in form["body"]]
        assert len(set(identifiers)) == len(identifiers)
        for field in form["body"]:
            assert field["type"] in ("textarea", "dropdown", "input", "checkboxes") and field["attributes"]["label"]


def test_hooks_need_no_network_and_have_the_commands_of_ci():
    repositories = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    commands = {hook["entry"].split(" --")[0] for hook in repositories[0]["hooks"]}
    checks = re.findall(r"^(?:ruff \w+|mypy)", read(".ci/run"), re.M)
    assert len(checks) == 3 and set(checks) <= commands
