"""Imports go one way, as docs/architecture.md says; the public names are those that were promised."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import domainnorm as dn

PACKAGE = Path(dn.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What a part imports of the others. A file belongs to the longest name that begins its own; "statistics" also stands
# for all files in it.
ALLOWED = {
    "errors": set(),
    "autograd": set(),
    "paths": {"errors"},
    "output": {"errors", "paths"},
    "config": {"errors", "paths", "output"},
    "distributed.collectives": set(),
    "distributed": {"errors", "autograd"},
    "data": {"errors", "paths", "output", "config", "distributed"},
    "visualization": {"errors", "paths", "output", "config", "distributed", "data"},
    "ops": {"autograd", "distributed.collectives"},
    "layers": {"autograd", "distributed.collectives", "ops"},
    "statistics": {"autograd", "distributed", "ops", "layers"},
    "surgery": {"errors", "paths", "output", "distributed", "ops", "layers", "statistics"},
    "auditing": {"errors", "distributed", "visualization", "ops", "layers", "statistics", "surgery"},
    "modeling": {
        *("errors", "paths", "output", "config", "distributed", "data"),
        *("ops", "layers", "statistics", "surgery"),
    },
    "evaluation": {
        *("errors", "paths", "output", "config", "distributed", "data", "visualization"),
        *("ops", "layers", "statistics", "surgery", "modeling"),
    },
    "engine": {
        *("errors", "paths", "output", "config", "distributed", "data", "visualization"),
        *("ops", "layers", "statistics", "surgery", "auditing", "modeling", "evaluation"),
    },
    "prediction": {
        *("errors", "paths", "output", "config", "distributed", "data", "visualization"),
        *("ops", "layers", "statistics", "surgery", "modeling", "evaluation", "engine"),
    },
    "cli": {
        *("errors", "paths", "output", "config", "distributed", "data", "visualization"),
        *("statistics", "surgery", "auditing", "modeling", "evaluation", "engine", "prediction"),
    },
}
BACKENDS = {
    "ops.eager",
    "ops.native",
    "ops.triton",
    "ops.fused",
    "ops.operator",
    "ops.select",
}  # of ops alone

# These need torch alone, but for the packages that some of their files import.
TORCH_ALONE = (
    *("errors", "autograd", "paths", "output", "distributed"),
    *("ops", "layers", "statistics", "surgery", "auditing"),
)
EXCEPTIONS = {
    "auditing/leak.py": {"tqdm"},
    "auditing/run.py": {"tqdm"},
    "distributed/roi_shuffle.py": {"numpy"},
    "ops/triton/kernels.py": {"triton"},  # imported where Triton is used
    "statistics/recompute.py": {"tqdm"},
    "surgery/export.py": {"onnxruntime"},  # imported where a model is exported to ONNX
    "surgery/export_boxes.py": {"onnx", "onnxruntime"},
}


def dotted(file):
    """The name of the module in `file`, within the package."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def within(name, parts):
    """Whether a module is one of `parts`, or in one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def imports(file):
    """The modules of the package that `file` imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from (".".join(path[1:]) for path in names if path[0] == "domainnorm")
        elif isinstance(node, ast.ImportFrom):
            path = (node.module or "").split(".") if node.module else []
            if node.level:
                folder = file.relative_to(PACKAGE).parent.parts
                path = [*folder[: len(folder) + 1 - node.level], *path]
            elif path[0] == "domainnorm":
                path = path[1:]
            else:
                continue
            for alias in node.names:
                inner = PACKAGE.joinpath(*path, alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                yield ".".join([*path, alias.name] if is_module else path)


def test_imports_go_one_way():
    assert len(FILES) > 80
    for file in FILES:
        name = dotted(file)
        if name == "__init__":
            continue  # it loads the public names when they are used
        part = max((part for part in ALLOWED if within(name, [part])), key=len, default=None)
        assert part, f"{name} belongs to no part: add it to ALLOWED"
        for imported in imports(file):
            assert within(imported, {part, *ALLOWED[part]}), f"{name} may not import {imported or 'the public names'}"


def test_imports_are_read_as_python_does():
    assert {"ops.eager", "ops.moments", "distributed.collectives"} <= set(imports(PACKAGE / "ops" / "fused.py"))
    assert {"ops.eager", "ops.moments", "ops.partition"} == set(imports(PACKAGE / "ops" / "triton" / "__init__.py"))
    assert "layers" in set(imports(PACKAGE / "statistics" / "choose.py"))


def test_layers_know_nothing_of_backends():
    for file in FILES:
        if not within(dotted(file), ["ops"]) and dotted(file) != "__init__":
            found = [name for name in imports(file) if within(name, BACKENDS)]
            assert not found, f"{dotted(file)} imports {found[0]}"


def test_few_files_lie_at_the_root():
    names = [path.name for path in PACKAGE.glob("*.py")]
    assert len(names) <= 6, names


def tree():
    """The files that the tree in docs/architecture.md has a line for, by their paths."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = []
    for line in re.search(r"```\ndomainnorm/.*?\n(.*?)```", text, re.S).group(1).splitlines():
        indentation, name = re.match(r"( *)(\S+)", line).groups()
        del folders[len(indentation) // 2 - 1 :]
        if name.endswith("/"):
            folders.append(name[:-1])
        else:
            yield "/".join([*folders, name])


def test_every_file_is_in_the_tree():
    """But for `__init__.py`, for which the line of the folder stands."""
    sources = [path for kind in ("py", "cpp", "h") for path in PACKAGE.rglob(f"*.{kind}")]
    files = {path.relative_to(PACKAGE).as_posix() for path in sources if path.name != "__init__.py"}
    drawn = list(tree())
    assert len(drawn) == len(set(drawn))
    assert sorted(set(drawn) ^ files) == []  # in docs/architecture.md or in domainnorm/ only


def setup_arguments():
    declared = {}
    with mock.patch("setuptools.setup", declared.update):
        runpy.run_path(str(ROOT / "setup.py"))
    return declared


PROMISED = {
    *("BatchGroupNorm", "BatchRenorm", "DomainBatchNorm", "DomainSequential", "FrozenBatchNorm", "GhostBatchNorm"),
    *("GroupedBatchNorm", "SeqNorm", "Moments", "RoIShuffle", "get_norm", "backends"),
    *("convert_batchnorm", "convert_groupnorm", "fuse", "export_model", "set_statistics", "virtual_batch"),
    *("set_example_weight", "choose_example_weight", "recompute_population_statistics", "merge_population_statistics"),
    *("use_domain", "name_domains", "add_domain", "keep_domain", "merge_domains", "nearest_domain"),
    *("audit", "load_config", "build_model", "train", "evaluate", "Predictor", "HookBase", "UserError"),
}


def test_the_public_names():
    assert set(dn.__all__) >= PROMISED
    for name in dn.__all__:
        value = getattr(dn, name)
        assert name == "__version__" or callable(value), name
    assert set(dn.__all__) <= set(dir(dn))
    with pytest.raises(AttributeError, match="no attribute 'BatchNorm'"):
        dn.BatchNorm  # noqa: B018


def test_the_documented_names_are_public():
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for name in re.findall(r"\bdn\.(\w+)", file.read_text(encoding="utf-8")):
            assert name in dn.__all__, f"{file.name} mentions dn.{name}"


def test_type_checkers_see_the_same_names():
    """What is imported for them is loaded from the same modules."""
    (block,) = (
        node
        for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.If)
    )
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == dn._HOMES


def test_the_version_is_that_of_the_installation():
    assert dn.__version__ == setup_arguments()["version"]


HEAVY = ("torchvision", "fvcore", "pycocotools", "tensorboard", "faster_coco_eval", "timm", "matplotlib")
LAYER = "import torch; dn.DomainBatchNorm(8)(torch.randn(4, 8, 5, 5)).sum().backward(); dn.backends()"
MODEL = (
    "model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8)); "
    "dn.convert_batchnorm(model, 'SeqNorm', num_sample_groups=2); dn.set_statistics(model, 'minibatch'); "
    "dn.recompute_population_statistics(model, [torch.randn(4, 3, 5, 5)], progress=False); "
    "dn.RoIShuffle; dn.export_model; dn.fuse; dn.use_domain; dn.virtual_batch; dn.set_example_weight"
)


@pytest.mark.parametrize(
    ("code", "packages"),
    [("", ("torch", "numpy", *HEAVY)), (LAYER, HEAVY), (f"{LAYER}; {MODEL}", HEAVY)],
    ids=["import", "layer", "model"],
)
def test_what_is_loaded_with_the_library(code, packages):
    """The package alone, without torch; its layers, and what is made of them, with torch alone."""
    code = f"import sys; import domainnorm as dn; {code}\nprint(*[name for name in {packages} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def requirements():
    """What setup.py declares: the names of all installations, and those of extras."""
    declared = setup_arguments()
    names = [re.match(r"[\w-]+", line).group() for line in declared["install_requires"]]
    extras = [re.match(r"[\w-]+", line).group() for lines in declared["extras_require"].values() for line in lines]
    return set(names), set(names) | set(extras)


def third_parties(file):
    """The packages that `file` imports which are not Python's, nor ours."""
    outside = PACKAGE not in file.parents
    # scripts, and their modules
    folders = [file.parent, ROOT / "tests", ROOT / "tools", ROOT / "tools" / "studies"] if outside else []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"domainnorm"}:
            if not any((folder / name).is_dir() or (folder / f"{name}.py").exists() for folder in folders):
                yield name


def test_the_core_needs_torch_alone():
    found = {}
    for file in FILES:
        if within(dotted(file), TORCH_ALONE) and (others := set(third_parties(file)) - {"torch"}):
            found[file.relative_to(PACKAGE).as_posix()] = others
    assert found == EXCEPTIONS


DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "faster_coco_eval": "faster-coco-eval"}
OF_TORCH = {"triton"}  # comes with torch where there may be a GPU, and is not needed elsewhere
ELSEWHERE = {("peer_ultralytics.py", "ultralytics")}  # which runs itself in an environment that has it


@pytest.mark.parametrize("folder", ["domainnorm", "tools", "tests", "examples"])
def test_what_is_imported_is_declared(folder):
    always, with_extras = requirements()
    optional = {
        "timm",
        "safetensors",
        "onnx",
        "onnxruntime",
        "matplotlib",
        "scipy",
    }  # imported where they are used, with an error that names the extra
    for file in (ROOT / folder).rglob("*.py"):
        for name in third_parties(file):
            if (file.name, name) in ELSEWHERE:
                continue
            declared = always | optional if folder == "domainnorm" else with_extras
            assert name in OF_TORCH or DISTRIBUTIONS.get(name, name) in declared, f"{file} imports {name}"
    assert optional <= with_extras


def test_the_folders_of_the_tests_are_those_of_the_package():
    own = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert own <= {path.name for path in PACKAGE.iterdir() if path.is_dir()} | {"tools", "examples"}
