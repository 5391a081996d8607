"""The C++ beside this, which an installation compiles for each kind of processor where there is a compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

SOURCE = sorted(path for kind in ("cpp", "h") for path in Path(__file__).parent.glob(f"*.{kind}"))
OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
TYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


WORDS = 6  # of a tensor: addresses of its gradient, itself and what is written; samples, length, last (`vectors.h`)


class _Team(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in OPENMP]


class Numbers(ctypes.Structure):
    """Numbers of rows, and how far those of one sample are from the next (`vectors.h`)."""

    _fields_ = [("at", ctypes.c_void_p), ("step", ctypes.c_int64)]


class Batches(ctypes.Structure):
    """Which rows are a normalization batch (`batches.h`)."""

    _fields_ = [
        ("group", ctypes.POINTER(ctypes.c_int64)),
        ("groups", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("together", ctypes.c_int64),
        ("eps", ctypes.c_double),
    ]


class Tables(ctypes.Structure):
    """Where moments are kept (`batches.h`)."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("counted", "batches", "rows", "first", "corrections")),
        ("write", ctypes.c_int64),
    ]


class Towards(ctypes.Structure):
    """What a Batch Renorm corrects its batches towards (`batches.h`)."""

    _fields_ = [
        *((name, Numbers) for name in ("mean", "var")),
        *((name, ctypes.POINTER(ctypes.c_double)) for name in ("r_max", "d_max")),
    ]


class Running(ctypes.Structure):
    """Population statistics, and how they take a step (`ema.cpp`)."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("mean", "var", "tracked")),
        ("apart", ctypes.c_int64),
        ("momentum", ctypes.c_double),
        ("of_deviation", ctypes.c_int64),
        ("eps", ctypes.c_double),
    ]


class Weighing(ctypes.Structure):
    """How a row and the population are weighed (`weighed.cpp`)."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("share", "eps")),
        *((name, Numbers) for name in ("mean", "var", "weight", "bias")),
    ]


TABLE = ctypes.c_void_p
PARTS = ctypes.POINTER(ctypes.c_int64)
FUNCTIONS: dict[str, list[Any]] = {  # what each takes after the tensors, their number and channels, and the threads
    "moments": [TABLE] * 2,
    "affine": [Numbers] * 3,
    "sums": [TABLE] * 2 + [Numbers],
    "gradient": [Numbers] * 4,
    "weighed": [Weighing],
    "normalize": [Batches, Numbers, Numbers, Tables, Towards],
    "normalize_gradient": [Batches, Numbers, Numbers, Tables, TABLE, TABLE],
    "sequence": [Batches, Numbers, Numbers, Tables],
    "sequence_gradient": [Batches, Numbers, Numbers, Tables, TABLE, TABLE],
}
COUNTS = ctypes.POINTER(ctypes.c_double)


def processor() -> str:
    """The kind of this one, by the instructions that torch itself uses here."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in ("avx512", "avx2") else "default"


def load(kind: str) -> ctypes.CDLL | None:
    """The library for a kind of processor; None if none was built of this source."""
    spec = importlib.util.find_spec(f"{__package__}._kernels_{kind}")
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
        for dtype in TYPES.values():
            function = getattr(library, f"{name}_{dtype}")
            function.argtypes = [PARTS, *[ctypes.c_int64] * 3, *others]
            function.restype = None
    for function in (library.ema_float32, library.ema_float64):
        function.argtypes = [TABLE, COUNTS, *[ctypes.c_int64] * 2, Running]
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


_LIBRARY = load(processor())


def takes(xs: Sequence[Tensor]) -> bool:
    """Whether the functions here can be given `xs`."""
    if _LIBRARY is None or are_watched():
        return False
    dtype = xs[0].dtype
    return dtype in TYPES and all(
        type(x) in (Tensor, Parameter)  # others may have no memory
        and x.dtype == dtype
        and x.is_cpu
        and x.shape[1] > 0
        and (x.is_contiguous() or is_last(x))
        for x in xs
    )


def are_watched() -> bool:
    """Whether operations are recorded or transformed, but not by a compiler: what is done here would not be seen."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or torch._C._functorch.peek_interpreter_stack() is not None  # torch.func
        or forward_ad._current_level >= 0
    )


def takes_batches(xs: Sequence[Tensor]) -> bool:
    """Whether whole batches of `xs` can be normalized here: what `takes` says, and all in one layout."""
    return takes(xs) and (all(x.is_contiguous() for x in xs) or all(map(is_last, xs)))


def takes_statistics(moments: Tensor, mean: Tensor, var: Tensor, tracked: Tensor) -> bool:
    """Whether `move` can move running means and variances, and counts of steps, by given moments."""
    if _LIBRARY is None or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    dtype = moments.dtype
    return (
        dtype in (torch.float32, torch.float64)
        and _lies_here(moments, dtype)
        and _lies_here(mean, dtype)
        and _lies_here(var, dtype)
        and _lies_here(tracked, torch.long)
    )


def _lies_here(value: Tensor, dtype: torch.dtype) -> bool:
    return type(value) is Tensor and value.dtype == dtype and value.is_cpu and value.is_contiguous()


def move(counts: Sequence[int], table: Tensor, running: Running) -> None:
    """A step for each of some sets, of means and variances `(2, sets, C)`."""
    sets = len(counts)
    function = getattr(_LIBRARY, f"ema_{TYPES[table.dtype]}")
    function(table.data_ptr(), (ctypes.c_double * sets)(*counts), sets, table.shape[2], running)


def call(function: str, xs: Sequence[Tensor], parts: ctypes.Array[ctypes.c_int64], *others: Any) -> None:
    """A function of `FUNCTIONS`, for the type of `xs`, on torch's threads."""
    getattr(_LIBRARY, f"{function}_{TYPES[xs[0].dtype]}")(
        parts, len(xs), xs[0].shape[1], torch.get_num_threads(), *others
    )


def parts(
    xs: Sequence[Tensor],
    outs: Sequence[Tensor] = (),
    grads: Sequence[Tensor] = (),
    last: bool | None = None,
) -> ctypes.Array[ctypes.c_int64]:
    """Tensors, what is written and their gradients, of each all in the same memory format.

    Args:
        last: whether they are gone through with the channels of each place together; None: each as suits it.
    """
    show(*xs, *grads)
    of: list[int] = []
    for k, x in enumerate(xs):
        shape = x.shape
        length = math.prod(shape[2:])
        of += (
            grads[k].data_ptr() if grads else 0,
            x.data_ptr(),
            outs[k].data_ptr() if outs else 0,
            shape[0],
            length,
            (length == 1 or not x.is_contiguous()) if last is None else last,
        )
    return (ctypes.c_int64 * (WORDS * len(xs)))(*of)


def numbers(values: Tensor | None, xs: Sequence[Tensor]) -> Numbers:
    """Of the rows of `xs`."""
    if values is None:
        return Numbers(None, 0)
    show(values)
    dtype = wide(xs[0])
    kept = values if values.dtype == dtype and values.stride(-1) == 1 else values.to(dtype).contiguous()
    step = kept.stride(0) if kept.ndim == 2 and len(kept) > 1 else 0
    of_rows = Numbers(kept.data_ptr(), step)
    of_rows.kept = kept  # as long as these are
    return of_rows


def keeping(kind: type[ctypes.Structure], *values: Any) -> Any:
    """A structure of `values`, which live as long: it holds their bytes only."""
    of = kind(*values)
    of.kept = values
    return of


def show(*tensors: Tensor | None) -> None:
    """To who watches torch's operations, and may first have to fetch their memory (`parking`)."""
    if torch._C._len_torch_dispatch_stack():
        for tensor in tensors:
            if tensor is not None:
                tensor.view_as(tensor)


def wide(x: Tensor) -> torch.dtype:
    """The type of the moments of `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_last(x: Tensor) -> bool:
    """Whether the channels of each place lie side by side."""
    layout = LAST.get(x.ndim)
    return layout is not None and x.is_contiguous(memory_format=layout)


def in_layout_of(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` in the type and the memory of `x`."""
    if grad.dtype == x.dtype and grad.stride() == x.stride():
        return grad
    return torch.empty_like(x).copy_(grad)
