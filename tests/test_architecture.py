"""Imports go one way, as docs/architecture.md draws them; the public face is what was promised."""

import ast
from pathlib import Path

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
