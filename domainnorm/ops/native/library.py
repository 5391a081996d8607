"""The compiled library: one is built at installation for each kind of processor, where there is a C++ compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import zlib
from pathlib import Path
from typing import Any

import torch

SOURCE = sorted(path for suffix in ("cpp", "h") for path in Path(__file__).parent.glob(f"*.{suffix}"))
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


class Values(ctypes.Structure):
    """Values of segments, and the distance from one segment's to the next (`segments.h`)."""

    _fields_ = [("at", ctypes.c_void_p), ("step", ctypes.c_int64)]


class _Team(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in OPENMP]


TABLE = ctypes.c_void_p
FUNCTIONS: dict[str, list[Any]] = {  # arguments after the parts, their number, the channels and the threads
    "moments": [TABLE, TABLE],
    "affine": [Values] * 3,
    "sums": [Values, TABLE, TABLE],
    "gradient": [Values] * 4,
}


def processor() -> str:
    """The kind of this processor, by the instructions that torch itself uses here."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in ("avx512", "avx2") else "default"


def load(kind: str) -> tuple[ctypes.CDLL | None, str]:
    """The library for a kind of processor, and a description of it; None, and the reason why it cannot be used."""
    spec = importlib.util.find_spec(f"{__package__}._kernels_{kind}")
    if spec is None or spec.origin is None:
        return None, "not compiled: at installation there was no C++ compiler, or it failed (pip install -v says why)"
    try:
        library = ctypes.CDLL(spec.origin)
        library.source.restype = ctypes.c_uint32
    except (OSError, AttributeError) as error:  # of another system, or another library
        return None, f"{spec.origin} cannot be loaded, run pip install again: {error}"
    if library.source() != zlib.crc32(b"".join(path.read_bytes() for path in SOURCE)):
        return None, f"{spec.origin} was compiled from another version of its source, run pip install again"
    if (team := _team()) is not None:
        library.use_team(team)
    for name, arguments in FUNCTIONS.items():
        for dtype in DTYPES.values():
            function = getattr(library, f"{name}_{dtype}")
            function.argtypes = [ctypes.POINTER(ctypes.c_int64), *[ctypes.c_int64] * 3, *arguments]
            function.restype = None
    return library, f"compiled for {kind} processors"


def _team() -> _Team | None:
    """The OpenMP functions that torch has loaded; None where there are none that can be found."""
    maps = Path("/proc/self/maps")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    found = [path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))]
    # of several, torch's own
    for path in sorted(found, key=lambda path: not path.startswith(str(Path(torch.__file__).parent))):
        openmp = ctypes.CDLL(path)
        if all(hasattr(openmp, name) for name in OPENMP):
            return _Team(*(ctypes.cast(getattr(openmp, name), ctypes.c_void_p) for name in OPENMP))
    return None
