"""Triton's functions of rows on a GPU: where they can be had, and do what the plain ones do."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from . import library, plain

TYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST = 16  # tensors: a kernel has its own code for each
SHORTEST, LONGEST = 32, 2**30  # numbers of the longest row: a program would be started for less; indices are of 32 bits

_tried: dict[tuple[torch.device, torch.dtype], ModuleType | None] = {}


def rows(xs: Sequence[Tensor]) -> ModuleType | None:
    """`triton_rows`, if it can be given `xs`."""
    device, dtype, channels = xs[0].device, xs[0].dtype, xs[0].shape[1]
    if device.type != "cuda" or dtype not in TYPES or len(xs) > MOST or not channels or library.are_watched():
        return None
    if not SHORTEST <= max(math.prod(x.shape[2:]) for x in xs) < LONGEST or not all(
        type(x) in (Tensor, Parameter) and x.dtype == dtype and x.device == device and x.is_contiguous() for x in xs
    ):
        return None
    if (device, dtype) not in _tried:
        # what is recorded, or must not wait, is no place to try
        recorded = torch.cuda.is_current_stream_capturing() or torch._C._len_torch_dispatch_stack()
        if recorded or torch.cuda.get_sync_debug_mode():
            return None
        _tried[device, dtype] = tried(device, dtype)
    return _tried[device, dtype]


def tried(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """`triton_rows`; None, with a warning, where it cannot be used.

    Whether Triton is there, finds what it needs and compiles for a device shows in its use only: a process tries it
    once with each device and type, and compares.
    """
    try:
        triton_rows = importlib.import_module(".triton_rows", __package__)
        _check(triton_rows, device, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        warnings.warn(
            f"normalization on {device} in {dtype} goes without Triton's kernels, and is slower: "
            f"{type(error).__name__}: {reason}",
            stacklevel=2,
        )
        return None
    return triton_rows


def _check(triton_rows: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """AssertionError where functions of rows of several lengths differ from the plain ones."""
    of_xs, of_grads, of_numbers = ([_waves(shape, k, device) for shape in SHAPES] for k in range(3))
    xs, grads = ([x.to(dtype) for x in waves] for waves in (of_xs, of_grads))
    numbers = torch.cat([x.flatten(2)[..., 0] for x in of_numbers])
    for name, given in {
        "moments": (xs,),
        "affine": (xs, numbers, numbers[:1], numbers[0]),
        "sums": (grads, xs, numbers),
        "gradient": (grads, xs, numbers, numbers[:1], numbers[0], numbers),
    }.items():
        found, expected = (getattr(module, name)(*given) for module in (triton_rows, plain))
        torch.testing.assert_close(list(found), list(expected), rtol=2e-2, atol=2e-2)


SHAPES = ((2, 3, 5, 7), (1, 3, 96, 100))


def _waves(shape: tuple[int, ...], k: int, device: torch.device) -> Tensor:
    """Numbers that no generator has to be asked for."""
    places = torch.arange(math.prod(shape), dtype=torch.float32, device=device)
    return (places * (k + 1.7)).sin().view(shape) + k
