"""On a CPU: `rows.cpp`, which an installation compiles for each kind of processor where there is a compiler."""

import ctypes
import importlib.util
import warnings
import zlib
from pathlib import Path

import torch
from torch import Tensor

from . import plain

SOURCE = Path(__file__).with_name("rows.cpp")
TYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
FUNCTIONS = {"moments": (3, 0), "affine": (2, 3), "sums": (4, 1), "gradient": (3, 4)}  # of tensors, numbers of rows


class _Size(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("samples", "channels", "length", "threads")]


class _Numbers(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("step", ctypes.c_int64)]


def _library() -> ctypes.CDLL | None:
    """Built for the instructions that torch itself uses here; None if there is none of this source."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    name = capability if capability in ("avx512", "avx2") else "default"
    spec = importlib.util.find_spec(f"{__package__}._rows_{name}")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    library.source.restype = ctypes.c_uint32
    if library.source() != zlib.crc32(SOURCE.read_bytes()):
        warnings.warn(
            f"{spec.origin} was built from another version of {SOURCE.name} and is not used: run pip install again",
            stacklevel=2,
        )
        return None
    for name, (tensors, numbers) in FUNCTIONS.items():
        for kind in TYPES.values():
            function = getattr(library, f"{name}_{kind}")
            function.argtypes = [*[ctypes.c_void_p] * tensors, *[_Numbers] * numbers, _Size, ctypes.c_bool]
            function.restype = None
    return library


_LIBRARY = _library()


def takes(x: Tensor) -> bool:
    """Whether the functions here can be given `x`."""
    return (
        _LIBRARY is not None
        and x.device.type == "cpu"
        and x.dtype in TYPES
        and x.ndim > 1
        and x.numel() > 0
        and (x.is_contiguous() or _is_last(x))
    )


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `plain.moments`, in one pass over `x`."""
    mean, var = (torch.empty(x.shape[:2], dtype=_wide(x)) for _ in range(2))
    _call("moments", x, [x, mean, var])
    return mean, var


def affine(x: Tensor, scale: Tensor, centre: Tensor, shift: Tensor) -> Tensor:
    """As `plain.affine`, in one pass."""
    y = torch.empty_like(x)
    _call("affine", x, [x, y], scale, centre, shift)
    return y


def sums(grad: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """As `plain.sums`, in one pass."""
    total, products = (torch.empty(x.shape[:2], dtype=_wide(x)) for _ in range(2))
    _call("sums", x, [_like(grad, x), x, total, products], centre)
    return total, products


def gradient(
    grad: Tensor | None, x: Tensor, scale: Tensor | None, centre: Tensor, to_mean: Tensor, to_var: Tensor
) -> Tensor:
    """As `plain.gradient`, in one pass."""
    if grad is None or scale is None:
        return plain.gradient(grad, x, scale, centre, to_mean, to_var)
    out = torch.empty_like(x)
    _call("gradient", x, [_like(grad, x), x, out], scale, centre, to_mean, to_var)
    return out


def _call(function: str, x: Tensor, tensors: list[Tensor], *numbers: Tensor) -> None:
    n, channels = x.shape[:2]
    dtype = _wide(x)
    kept = [
        value if value.dtype == dtype and value.stride(-1) == 1 else value.to(dtype).contiguous() for value in numbers
    ]
    getattr(_LIBRARY, f"{function}_{TYPES[x.dtype]}")(
        *(tensor.data_ptr() for tensor in tensors),
        *(_Numbers(v.data_ptr(), v.stride(0) if v.ndim == 2 and len(v) == n > 1 else 0) for v in kept),
        _Size(n, channels, x.numel() // (n * channels), torch.get_num_threads()),
        not x.is_contiguous(),
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _is_last(x: Tensor) -> bool:
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in layouts and x.is_contiguous(memory_format=layouts[x.ndim])


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` in the type and the memory of `x`."""
    grad = grad.to(x.dtype)
    return grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
