"""What an installation brings along."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import domainnorm as dn

ROOT = Path(__file__).resolve().parents[1]
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")


@needs_sources
def test_configs_travel_in_the_package(tmp_path):
    for name in ("domainnorm", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "source")
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "built")]
    subprocess.run(build, cwd=tmp_path / "source", check=True)
    built = tmp_path / "built" / "domainnorm"
    found, expected = (
        {path.relative_to(folder): path.read_text() for path in folder.rglob("*.yaml")}
        for folder in (built / "configs", ROOT / "configs")
    )
    assert found == expected and len(found) > 30
    assert (built / "ops/native/segments.h").exists() and (built / "py.typed").exists()


@pytest.mark.parametrize("name", ["quickstart.yaml", "configs/quickstart.yaml", "paper/table5/row1_1x.yaml"])
def test_own_configs_are_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dn.load_config(name).MODEL.META_ARCHITECTURE == "RetinaNet"


def test_a_file_of_the_user_comes_before_an_own_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").write_text("SEED: 7\n")
    assert dn.load_config("quickstart.yaml").SEED == 7


def test_a_missing_config_names_the_own_ones(tmp_path):
    with pytest.raises(dn.UserError, match=r"none.yaml: no such file, nor one of the library's own: .*quickstart.yaml"):
        dn.load_config(tmp_path / "none.yaml")
