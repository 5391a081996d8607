"""On a CPU: the C++ beside this, which an installation compiles for each kind of processor where there is a compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import plain

if TYPE_CHECKING:
    from ..batches import Batches

Tables = tuple[Tensor, Tensor, Tensor, Tensor]  # means and variances: of channels (groups, C), of batches

SOURCE = sorted(path for kind in ("cpp", "h") for path in Path(__file__).parent.glob(f"*.{kind}"))
OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
TYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


class _Part(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad", "x", "out")),
        *((name, ctypes.c_int64) for name in ("samples", "length", "last")),
    ]


class _Team(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in OPENMP]


class _Numbers(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("step", ctypes.c_int64)]


class _Batches(ctypes.Structure):
    _fields_ = [
        ("group", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("eps", ctypes.c_double),
    ]


class _Tables(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("mean", "var", "batch_mean", "batch_var")),
        *((name, ctypes.c_int64) for name in ("fill", "use")),
    ]


_TABLE = ctypes.c_void_p
FUNCTIONS = {  # what each takes after the tensors, their number and channels, and the threads
    "moments": [_TABLE] * 2,
    "affine": [_Numbers] * 3,
    "sums": [_TABLE] * 2 + [_Numbers],
    "gradient": [_Numbers] * 4,
    "normalize": [_Batches, _Numbers, _Numbers, _Tables],
    "normalize_gradient": [_Batches, _Numbers, _Numbers, _Tables, _TABLE, _TABLE],
}


def _library() -> ctypes.CDLL | None:
    """Built for the instructions that torch itself uses here; None if there is none of this source."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    name = capability if capability in ("avx512", "avx2") else "default"
    spec = importlib.util.find_spec(f"{__package__}._kernels_{name}")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        library.source.restype = ctypes.c_uint32
    except (OSError, AttributeError) as error:  # of another system, or another library
        warnings.warn(f"{spec.origin} cannot be used: run pip install again ({error})", stacklevel=2)
        return None
    if library.source() != zlib.crc32(b"".join(path.read_bytes() for path in SOURCE)):
        warnings.warn(
            f"{spec.origin} was built from another version of its source and is not used: run pip install again",
            stacklevel=2,
        )
        return None
    if (team := _team()) is not None:
        library.use_team(team)
    for name, others in FUNCTIONS.items():
        for kind in TYPES.values():
            function = getattr(library, f"{name}_{kind}")
            function.argtypes = [ctypes.POINTER(_Part), *[ctypes.c_int64] * 3, *others]
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


def takes_batches(xs: Sequence[Tensor]) -> bool:
    """Whether `normalize` can be given `xs`: what `takes` says, and all in one layout."""
    return takes(xs) and (all(x.is_contiguous() for x in xs) or all(map(_is_last, xs)))


def moments(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """As `plain.moments`, in one pass over each tensor."""
    mean, var = _empty_tables(xs)
    _call("moments", xs, [_part(x) for x in xs], mean.data_ptr(), var.data_ptr())
    return mean, var


def affine(xs: Sequence[Tensor], scale: Tensor, centre: Tensor, shift: Tensor) -> list[Tensor]:
    """As `plain.affine`, in one pass."""
    ys = [torch.empty_like(x) for x in xs]
    parts = [_part(x, out=y) for x, y in zip(xs, ys, strict=True)]
    _call("affine", xs, parts, *(_numbers(v, xs) for v in (scale, centre, shift)))
    return ys


def sums(grads: Sequence[Tensor], xs: Sequence[Tensor], centre: Tensor) -> tuple[Tensor, Tensor]:
    """As `plain.sums`, in one pass."""
    total, products = _empty_tables(xs)
    grads = [_like(grad, x) for grad, x in zip(grads, xs, strict=True)]
    parts = [_part(x, grad) for grad, x in zip(grads, xs, strict=True)]
    _call("sums", xs, parts, total.data_ptr(), products.data_ptr(), _numbers(centre, xs))
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
    _call("gradient", xs, parts, *(_numbers(v, xs) for v in (scale, centre, to_mean, to_var)))
    return outs


def batch_moments(xs: Sequence[Tensor], batches: Batches) -> Tables:
    """The moments that `normalize` normalizes by."""
    tables = _empty_batch_tables(xs, batches)
    _call("normalize", xs, [_part(x) for x in xs], *_of(batches, 0.0, None, None, xs), _tables(tables, fill=True))
    return tables


def normalize(
    xs: Sequence[Tensor],
    batches: Batches,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tables: Tables | None = None,
) -> tuple[list[Tensor], Tables]:
    """As `batches.composed`, by the moments `tables` or its own, which it returns."""
    known, tables = tables is not None, tables or _empty_batch_tables(xs, batches)
    ys = [torch.empty_like(x) for x in xs]
    parts = [_part(x, out=y) for x, y in zip(xs, ys, strict=True)]
    _call("normalize", xs, parts, *_of(batches, eps, weight, bias, xs), _tables(tables, fill=not known, use=True))
    return ys, tables


def normalize_gradient(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    batches: Batches,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tables: Tables,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of `normalize`: of the tensors, and of γ and β, of each row if one of these is, else of each group."""
    each = any(v is not None and v.ndim == 2 and len(v) > 1 for v in (weight, bias))
    to_weight, to_bias = torch.zeros(
        2, sum(map(len, xs)) if each else batches.groups, xs[0].shape[1], dtype=_wide(xs[0])
    ).unbind()
    outs = [torch.empty_like(x) for x in xs]
    grads = [_like(grad, x) for grad, x in zip(grads, xs, strict=True)]
    parts = [_part(x, grad, out) for grad, x, out in zip(grads, xs, outs, strict=True)]
    given = (*_of(batches, eps, weight, bias, xs), _tables(tables))
    _call("normalize_gradient", xs, parts, *given, to_weight.data_ptr(), to_bias.data_ptr())
    return outs, to_weight, to_bias


def _call(function: str, xs: Sequence[Tensor], parts: list[_Part], *others: Any) -> None:
    getattr(_LIBRARY, f"{function}_{TYPES[xs[0].dtype]}")(
        (_Part * len(parts))(*parts), len(parts), xs[0].shape[1], torch.get_num_threads(), *others
    )


def _part(x: Tensor, grad: Tensor | None = None, out: Tensor | None = None) -> _Part:
    _show(x, *(() if grad is None else (grad,)))
    pointers = (None if v is None else v.data_ptr() for v in (grad, x, out))
    length = math.prod(x.shape[2:])
    return _Part(*pointers, len(x), length, length == 1 or not x.is_contiguous())


def _numbers(values: Tensor | None, xs: Sequence[Tensor]) -> _Numbers:
    """Of the rows of `xs`."""
    if values is None:
        return _Numbers(None, 0)
    _show(values)
    dtype = _wide(xs[0])
    kept = values if values.dtype == dtype and values.stride(-1) == 1 else values.to(dtype).contiguous()
    step = kept.stride(0) if kept.ndim == 2 and len(kept) > 1 else 0
    numbers = _Numbers(kept.data_ptr(), step)
    numbers.kept = kept  # as long as these are
    return numbers


def _of(
    batches: Batches, eps: float, weight: Tensor | None, bias: Tensor | None, xs: Sequence[Tensor]
) -> tuple[_Batches, _Numbers, _Numbers]:
    group = None if batches.group is None else batches.group.data_ptr()
    return _Batches(group, batches.groups, batches.width, eps), _numbers(weight, xs), _numbers(bias, xs)


def _tables(tables: Tables, fill: bool = False, use: bool = False) -> _Tables:
    return _Tables(*(v.data_ptr() for v in tables), fill, use)


def _show(*tensors: Tensor) -> None:
    """To who watches torch's operations, and may first have to fetch their memory (`parking`)."""
    if torch._C._len_torch_dispatch_stack():
        for tensor in tensors:
            tensor.view_as(tensor)


def _empty_tables(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    shape = (sum(map(len, xs)), xs[0].shape[1])
    return torch.empty(shape, dtype=_wide(xs[0])), torch.empty(shape, dtype=_wide(xs[0]))


def _empty_batch_tables(xs: Sequence[Tensor], batches: Batches) -> Tables:
    groups, channels, dtype = batches.groups, xs[0].shape[1], _wide(xs[0])
    mean, var = torch.empty(groups, channels, dtype=dtype), torch.empty(groups, channels, dtype=dtype)
    if batches.width == 1:
        return mean, var, mean, var
    sets = channels // batches.width
    return mean, var, torch.empty(groups, sets, dtype=dtype), torch.empty(groups, sets, dtype=dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _is_last(x: Tensor) -> bool:
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in layouts and x.is_contiguous(memory_format=layouts[x.ndim])


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` in the type and the memory of `x`."""
    grad = grad.to(x.dtype)
    return grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
