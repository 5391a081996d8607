import os
import platform
import re
import shutil
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SOURCE = (HERE / "domainnorm" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', SOURCE, re.M).group(1)
KERNELS = sorted(path for kind in ("cpp", "h") for path in HERE.glob(f"domainnorm/ops/native/*.{kind}"))
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fopenmp-simd", "-Wno-psabi"]
SANITIZE = []  # as docs/reliability.md says
if kinds := os.environ.get("DOMAINNORM_SANITIZE"):
    SANITIZE = [f"-fsanitize={kinds}", "-fno-omit-frame-pointer", "-g"]
KINDS = {"default": []}  # of processors, and what a compiler must know of them
if platform.machine() in ("x86_64", "AMD64"):
    KINDS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}


class BuildWithConfigs(build_py):
    """Copies the configs into the package, as `domainnorm/configs`; an editable installation reads them here."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(HERE / "configs", Path(self.build_lib, "domainnorm", "configs"), dirs_exist_ok=True)


setup(
    name="domainnorm",
    version=VERSION,
    description='Detection and classification with the "batch" of BatchNorm as an explicit choice',
    long_description=HERE.joinpath("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    author="domainnorm developers",
    classifiers=[
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    keywords=["batch normalization", "object detection", "RetinaNet", "Mask R-CNN", "PyTorch"],
    entry_points={"console_scripts": ["domainnorm = domainnorm.cli:main"]},
    package_dir={"": "."},  # so that an editable installation is a path, which static tools see
    packages=find_packages(include=["domainnorm", "domainnorm.*"]),
    package_data={"domainnorm": ["py.typed", "ops/native/*.cpp", "ops/native/*.h"]},
    cmdclass={"build_py": BuildWithConfigs},
    ext_modules=[
        Extension(
            f"domainnorm.ops.native._kernels_{kind}",
            [str(path.relative_to(HERE)) for path in KERNELS if path.suffix == ".cpp"],
            depends=[str(path.relative_to(HERE)) for path in KERNELS],
            define_macros=[("SOURCE", str(zlib.crc32(b"".join(path.read_bytes() for path in KERNELS))))],
            extra_compile_args=[*FLAGS, *options, *SANITIZE],
            extra_link_args=SANITIZE,
            optional=True,  # without a compiler, operations of torch do the same, slower
        )
        for kind, options in KINDS.items()
    ],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "fvcore>=0.1.5.post20221221",
        "pycocotools>=2.0.8",
        "faster-coco-eval>=1.8",
        "matplotlib",
        "numpy",
        "pillow",
        "pyyaml",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "dev": [
            *("pytest", "pytest-cov", "pytest-xdist", "hypothesis", "ruff", "mypy", "pre-commit"),
            *("build", "setuptools>=77", "nbclient", "ipykernel"),
            *("timm", "safetensors", "onnx", "onnxscript", "onnxruntime", "scipy"),
        ],
        "docs": ["sphinx", "myst-parser", "pydata-sphinx-theme", "sphinx-copybutton", "sphinx-design"],
        "export": ["onnx", "onnxscript", "onnxruntime"],
        "svhn": ["scipy"],
    },
)
