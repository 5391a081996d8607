"""What a run was started with, for its log."""

import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torchvision
from fvcore.common.config import CfgNode

from ..distributed import gather_objects

_LIBRARY = sys.modules[__name__.partition(".")[0]]


def describe_run(cfg: CfgNode, device: torch.device, weights: str | Path) -> list[str]:
    """Lines: command, versions, devices, data sets and where the `weights` are from. Every rank calls it."""
    devices = gather_objects(f"{_name(device)} of {socket.gethostname()}")
    counts = {name: devices.count(name) for name in devices}
    sets = cfg.DATASETS
    return [
        f"command: {shlex.join([sys.executable, *sys.argv])} (in {Path.cwd()})",
        f"versions: domainnorm {_LIBRARY.__version__}{_commit()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, Python {platform.python_version()}, {platform.platform()}",
        "processes: " + ", ".join(f"{count} x {name}" for name, count in counts.items()),
        f"data sets: training {list(sets.TRAIN)}, test {list(sets.TEST)}",
        f"weights: {weights or 'random'}",
    ]


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads, {os.cpu_count()} cores)"


def _commit() -> str:
    """The commit of the source tree that the library is imported from; "" if it is not in one."""
    root = Path(str(_LIBRARY.__file__)).parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f" ({done.stdout.strip()})" if done.returncode == 0 else ""
