"""Imports go one way, as docs/architecture.md draws them; the public face is what was promised."""

import ast
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest

import domainnorm as dn

PACKAGE = Path(dn.__file__).parent
LOWER = {
    "errors": set(),
    "config": {"errors"},
    "distributed": {"errors"},
    "output": {"errors"},
    "kernels": set(),
    "merges": {"distributed"},
    "moments": {"distributed", "kernels", "merges"},
    "roi_shuffle": {"distributed", "moments"},
    "batches": {"kernels", "moments"},
    "layers": {"batches", "kernels", "moments", "distributed"},
    "convert": {"layers", "moments"},
    "example_weight": {"convert", "layers"},
    "parking": set(),
    "lockstep": {"parking"},
    "estimators": {"moments", "distributed", "layers"},
    "population": {"convert", "moments", "distributed", "layers", "estimators", "lockstep", "parking", "roi_shuffle"},
    "domains": {"layers", "moments", "population"},
    "virtual_batch": {"convert", "moments", "layers", "lockstep"},
    "fuse": {"layers"},
    "export": {"convert", "domains", "errors", "fuse", "layers", "modeling", "output"},
    "data": {"errors", "distributed", "output"},
    "modeling": {
        *("domains", "errors", "config", "distributed", "moments", "layers", "convert", "roi_shuffle", "data")
    },
    "evaluation": {
        *("errors", "config", "distributed", "output", "layers", "convert", "population", "data", "modeling"),
        *("domains", "example_weight"),
    },
    "engine": {
        *(
            "errors",
            "config",
            "distributed",
            "output",
            "layers",
            "convert",
            "population",
            "data",
            "modeling",
        ),
        "evaluation",
    },
}


def imports(file):
    """The top-level parts of the package that `file` imports."""
    inside = file.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            path = [*inside[: len(inside) - node.level], *(node.module or "").split(".")]
            names = [path[0]] if path[0] else [alias.name for alias in node.names]
            yield from (name for name in names if name)


def test_imports_go_one_way():
    files = [f for f in PACKAGE.rglob("*.py") if f.name != "__init__.py" or f.parent != PACKAGE]
    assert len(files) > 20
    for file in files:
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports(file):
            assert name == part or name in LOWER[part], f"{file} may not import {name}"


def test_the_public_face():
    for name in (
        *("DomainBatchNorm", "DomainSequential", "FrozenBatchNorm", "set_statistics", "load_config", "build_model"),
        *("train", "evaluate"),
    ):
        assert name in dn.__all__ and callable(getattr(dn, name))


def test_every_file_is_in_the_tree():
    tree = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    for file in PACKAGE.rglob("*.py"):
        if file.name != "__init__.py":
            assert f"  {file.name}" in tree, f"docs/architecture.md does not mention {file}"


def requirements():
    """What setup.py declares: the names of all installations, and those of extras."""
    declared = {}
    with mock.patch("setuptools.setup", declared.update):
        runpy.run_path(str(PACKAGE.parent / "setup.py"))
    names = [re.match(r"[\w-]+", line).group() for line in declared["install_requires"]]
    extras = [re.match(r"[\w-]+", line).group() for lines in declared["extras_require"].values() for line in lines]
    return set(names), set(names) | set(extras)


def third_parties(folder):
    """The packages that files import which are not Python's, nor ours."""
    ours = [path for name in ("tools", "tests") for path in (PACKAGE.parent / name).rglob("*")]
    own = {path.stem for path in ours if path.is_dir() or path.suffix == ".py"}
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - own - {"domainnorm"}:
                yield file, name


DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "faster_coco_eval": "faster-coco-eval"}
OF_TORCH = {"triton"}  # comes with torch where there may be a GPU, and is not needed elsewhere


@pytest.mark.parametrize("folder", ["domainnorm", "tools", "tests"])
def test_what_is_imported_is_declared(folder):
    always, with_extras = requirements()
    optional = {"timm", "onnxruntime", "matplotlib"}  # imported where they are used, with an error that names the extra
    for file, name in third_parties(PACKAGE.parent / folder):
        declared = always | optional if folder == "domainnorm" else with_extras
        assert name in OF_TORCH or DISTRIBUTIONS.get(name, name) in declared, f"{file} imports {name}"
    assert optional <= with_extras
