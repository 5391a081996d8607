from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="domainnorm",
    version="0.1.0",
    description='Detection and classification with the "batch" of BatchNorm as an explicit choice',
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["domainnorm", "domainnorm.*"]),
    package_data={"domainnorm": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "fvcore>=0.1.5.post20221221",
        "pycocotools>=2.0.8",
        "faster-coco-eval>=1.8",
        "numpy",
        "pillow",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "dev": ["pytest", "hypothesis", "ruff", "mypy", "timm", "onnx", "onnxscript", "onnxruntime"],
        "export": ["onnx", "onnxscript", "onnxruntime"],
        "studies": ["matplotlib"],
    },
)
