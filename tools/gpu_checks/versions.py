"""What is installed, and the card."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from benchmarks.table import Row

PACKAGES = ("torch", "torchvision", "triton", "numpy", "domainnorm", "pytest", "hypothesis", "fvcore", "pycocotools")


def measure(device: str, small: bool) -> Iterator[Row]:
    """One fact a row."""
    found = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    found["commit"] = _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    found["processor cores"] = str(os.cpu_count())
    # Triton compiles what starts its kernels, and needs both.
    found["C compiler"] = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "none"
    found["Python.h"] = str(Path(sysconfig.get_path("include"), "Python.h").is_file())
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found["card"] = card.name
        found["compute capability"] = f"{card.major}.{card.minor}"
        found["memory, GB"] = f"{card.total_memory / 1e9:.1f}"
        found["multiprocessors"] = str(card.multi_processor_count)
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["CUDA"] = str(torch.version.cuda)
        found["cuDNN"] = str(torch.backends.cudnn.version())
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "none"
        found["a sum on the card"] = str(torch.ones(1000, device=device).sum().item())
    for what, value in found.items():
        yield {"what": what, "value": value}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
