"""What an installation brings along, and that it works without the source tree."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import domainnorm as dn

ROOT = Path(__file__).resolve().parents[1]
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")


def copy_sources(folder):
    """A build writes beside its sources."""
    for name in ("domainnorm", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)


@needs_sources
def test_configs_travel_in_the_package(tmp_path):
    copy_sources(tmp_path / "source")
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


def run(*command, folder):
    """What the command prints; it reaches neither this source tree nor a package index."""
    variables = dict(os.environ, PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    variables.pop("PYTHONPATH", None)
    done = subprocess.run(list(map(str, command)), cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist, and the wheel that is built from it, by `python -m build`."""
    pytest.importorskip("build")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    copy_sources(source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, folder=source)
    return {"sdist": next(built.glob("*.tar.gz")), "wheel": next(built.glob("*.whl"))}


@needs_sources
@pytest.mark.slow
def test_what_the_distributions_hold(distributions):
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = "domainnorm/ops/native"
    kernels = {f"{native}/{path.name}" for path in (ROOT / native).iterdir() if path.suffix in (".cpp", ".h")}
    assert len(kernels) >= 3 and kernels <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "setup.py", "domainnorm/py.typed"} <= names
    assert "configs/quickstart.yaml" in names
    assert not [name for name in names if name.startswith("tests") or name.endswith(".so")]
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        names = set(archive.namelist())
    metadata = f"domainnorm-{dn.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"domainnorm", metadata}
    assert {"domainnorm/py.typed", "domainnorm/configs/quickstart.yaml", f"{metadata}/licenses/LICENSE"} <= names


@pytest.fixture
def environment(tmp_path):
    """A fresh virtual environment that finds the packages of this one.

    A folder that a `.pth` file names is searched, but its own `.pth` files are not read: an editable installation of
    domainnorm is not found.
    """
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    (own,) = folder.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (own / "packages.pth").write_text("\n".join(packages))
    return folder


@needs_sources
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_installation_works_in_an_empty_folder(kind, distributions, environment, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    python, domainnorm = environment / "bin" / "python", environment / "bin" / "domainnorm"
    options = ["--ignore-installed", "--no-deps", "--no-build-isolation"]
    run(python, "-m", "pip", "install", *options, distributions[kind], folder=empty)
    code = "import domainnorm as dn; print(dn.__version__, dn.__file__, dn.backends()['native'], sep='\\n')"
    version, file, native = run(python, "-c", code, folder=empty).splitlines()
    assert version == dn.__version__ and environment in Path(file).parents
    assert native.startswith("available: compiled for") == (shutil.which("c++") is not None)
    assert "train" in run(domainnorm, "--help", folder=empty)
    assert "BASE_LR" in run(domainnorm, "explain", "SOLVER.BASE_LR", folder=empty)
    options = ["SOLVER.MAX_ITER", 2, "DATASETS.TEST", "[]"]
    run(domainnorm, "train", "--config-file", "configs/quickstart.yaml", *options, folder=empty)
    assert (empty / "output" / "quickstart" / "model_final.pth").is_file()
