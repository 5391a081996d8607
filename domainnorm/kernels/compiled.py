"""On a CPU: `rows.cpp`, which an installation compiles for each kind of processor where there is a compiler."""

import ctypes
import importlib.util
import math
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from . import plain

SOURCE = Path(__file__).with_name("rows.cpp")
OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
TYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
FUNCTIONS = {"moments": (2, 0), "affine": (0, 3), "sums": (2, 1), "gradient": (0, 4)}  # tables written, numbers read


class _Part(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad", "x", "out")),
        *((name, ctypes.c_int64) for name in ("samples", "length", "last")),
    ]


class _Team(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in OPENMP]


class _Numbers(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("step", ctypes.c_int64)]


def _library() -> ctypes.CDLL | None:
    """Built for the instructions that torch itself uses here; None if there is none of this source."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    name = capability if capability in ("avx512", "avx2") else "default"
    spec = importlib.util.find_spec(f"{__package__}._rows_{name}")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        library.source.restype = ctypes.c_uint32
    except (OSError, AttributeError) as error:  # of another system, or another library
        warnings.warn(f"{spec.origin} cannot be used: run pip install again ({error})", stacklevel=2)
        return None
    if library.source() != zlib.crc32(SOURCE.read_bytes()):
        warnings.warn(
            f"{spec.origin} was built from another version of {SOURCE.name} and is not used: run pip install again",
            stacklevel=2,
        )
        return None
    if (team := _team()) is not None:
        library.use_team(team)
    for name, (tables, numbers) in FUNCTIONS.items():
        for kind in TYPES.values():
            function = getattr(library, f"{name}_{kind}")
            function.argtypes = [
                ctypes.POINTER(_Part),
                *[ctypes.c_int64] * 3,
                *[ctypes.c_void_p] * tables,
                *[_Numbers] * numbers,
            ]
            function.restype = None
    return library


def _team() -> _Team | None:
    """The threads of the OpenMP that torch has loaded; None where it has none that can be found."""
    maps = Path("/proc/self/maps")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    found = [path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))]
    # of several, torch's own
    for path in sorted(found, key=lambda path: not path.startswith(str(Path(torch.__file__).parent))):
        openmp = ctypes.CDLL(path)
        if all(hasattr(openmp, name) for name in OPENMP):
            return _Team(*(ctypes.cast(getattr(openmp, name), ctypes.c_void_p) for name in OPENMP))
    return None


_LIBRARY = _library()


def takes(xs: Sequence[Tensor]) -> bool:
    """Whether the functions here can be given `xs`."""
    if _LIBRARY is None or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return False  # there is none, or operations are traced, and these would not be seen
    dtype = xs[0].dtype
    return dtype in TYPES and all(
        type(x) in (Tensor, Parameter)  # others may have no memory
        and x.dtype == dtype
        and x.device.type == "cpu"
        and x.shape[1] > 0
        and (x.is_contiguous() or _is_last(x))
        for x in xs
    )


def moments(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """As `plain.moments`, in one pass over each tensor."""
    mean, var = _empty_tables(xs)
    _call("moments", xs, [_part(x) for x in xs], [mean, var])
    return mean, var


def affine(xs: Sequence[Tensor], scale: Tensor, centre: Tensor, shift: Tensor) -> list[Tensor]:
    """As `plain.affine`, in one pass."""
    ys = [torch.empty_like(x) for x in xs]
    _call("affine", xs, [_part(x, out=y) for x, y in zip(xs, ys, strict=True)], [], scale, centre, shift)
    return ys


def sums(grads: Sequence[Tensor], xs: Sequence[Tensor], centre: Tensor) -> tuple[Tensor, Tensor]:
    """As `plain.sums`, in one pass."""
    total, products = _empty_tables(xs)
    grads = [_like(grad, x) for grad, x in zip(grads, xs, strict=True)]
    _call("sums", xs, [_part(x, grad) for grad, x in zip(grads, xs, strict=True)], [total, products], centre)
    return total, products


def gradient(
    grads: Sequence[Tensor] | None,
    xs: Sequence[Tensor],
    scale: Tensor | None,
    centre: Tensor,
    to_mean: Tensor,
    to_var: Tensor,
) -> list[Tensor]:
    """As `plain.gradient`, in one pass."""
    if grads is None or scale is None:
        return plain.gradient(grads, xs, scale, centre, to_mean, to_var)
    outs = [torch.empty_like(x) for x in xs]
    grads = [_like(grad, x) for grad, x in zip(grads, xs, strict=True)]
    parts = [_part(x, grad, out) for grad, x, out in zip(grads, xs, outs, strict=True)]
    _call("gradient", xs, parts, [], scale, centre, to_mean, to_var)
    return outs


def _call(function: str, xs: Sequence[Tensor], parts: list[_Part], tables: list[Tensor], *numbers: Tensor) -> None:
    rows, dtype = sum(part.samples for part in parts), _wide(xs[0])
    _show(*numbers)
    kept = [v if v.dtype == dtype and v.stride(-1) == 1 else v.to(dtype).contiguous() for v in numbers]
    getattr(_LIBRARY, f"{function}_{TYPES[xs[0].dtype]}")(
        (_Part * len(parts))(*parts),
        len(parts),
        xs[0].shape[1],
        torch.get_num_threads(),
        *(table.data_ptr() for table in tables),
        *(_Numbers(v.data_ptr(), v.stride(0) if v.ndim == 2 and len(v) == rows > 1 else 0) for v in kept),
    )


def _part(x: Tensor, grad: Tensor | None = None, out: Tensor | None = None) -> _Part:
    _show(x, *(() if grad is None else (grad,)))
    pointers = (None if v is None else v.data_ptr() for v in (grad, x, out))
    return _Part(*pointers, len(x), math.prod(x.shape[2:]), not x.is_contiguous())


def _show(*tensors: Tensor) -> None:
    """To who watches torch's operations, and may first have to fetch their memory (`parking`)."""
    if torch._C._len_torch_dispatch_stack():
        for tensor in tensors:
            tensor.view_as(tensor)


def _empty_tables(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    shape = (sum(map(len, xs)), xs[0].shape[1])
    return torch.empty(shape, dtype=_wide(xs[0])), torch.empty(shape, dtype=_wide(xs[0]))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _is_last(x: Tensor) -> bool:
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in layouts and x.is_contiguous(memory_format=layouts[x.ndim])


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` in the type and the memory of `x`."""
    grad = grad.to(x.dtype)
    return grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
