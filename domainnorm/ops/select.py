"""The one place that chooses what a normalization is computed with, and says why.

`eager` does everything. Beside it, where they are faster and nothing would stop working: torch's own kernel for a plain
BatchNorm, C++ on a CPU (`native`), Triton on a GPU.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..autograd import is_transform_active
from . import eager, native, triton
from .native import CHANNELS_LAST

if TYPE_CHECKING:
    from .formula import Normalization

VARIABLE = "DOMAINNORM_BACKEND"  # of the environment: the only backend to be tried before eager
NAMES = ("eager", "torch", "native", "triton")
KERNELS: dict[str, ModuleType] = {"eager": eager, "native": native, "triton": triton}
SMALL = 400_000  # elements of a tensor: with fewer, calls cost more than the work
SMALL_COMPILED = 1_200_000  # of an input: with fewer, what the compiler fuses stays in the caches
SHORT_ROW = 32  # elements of a sample's channel: with fewer, starting it does
logger = logging.getLogger(__name__)


def select_backend(problems: Sequence[Normalization]) -> str:
    """The name of the fastest backend that can compute `problems`, and its gradients.

    `DOMAINNORM_BACKEND` forces one; where that cannot do it, it is eager. The logger of this module says at level DEBUG
    which one was taken, and why not another.
    """
    forced = forced_backend()
    tried = (forced,) if forced else ("torch", "native", "triton")
    reasons = {}
    chosen = "eager"
    for name in tried:
        reasons[name] = _refusal(name, problems, bool(forced))
        if not reasons[name]:
            chosen = name
            break
    if not torch.compiler.is_compiling() and logger.isEnabledFor(logging.DEBUG):
        why = "".join(f"; not {name}: {reason}" for name, reason in reasons.items() if reason)
        logger.debug("%s computes inputs of %s%s", chosen, [tuple(x.shape) for x in problems[0].tensors], why)
    return chosen


def forced_backend() -> str:
    """What `DOMAINNORM_BACKEND` says; "" if it says nothing.

    Raises:
        ValueError: it is no backend's name.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced and forced not in NAMES:
        raise ValueError(f"{VARIABLE} takes one of {list(NAMES)}, got {forced!r}")
    return forced


def backends() -> dict[str, str]:
    """List the backends that can compute normalizations in this installation.

    Returns:
        A dict from the name of each backend to "available", or to why it is not.

    Example::

        >>> dn.backends()  # doctest: +SKIP
        {'eager': 'available', 'torch': 'available', 'native': 'available: compiled for avx512 processors',
        'triton': 'torch finds no CUDA device'}
    """
    found = {"eager": "available", "torch": "available"}
    found["native"] = ("available: " if native.is_available() else "") + native.description
    found["triton"] = triton.unavailable() or "available"
    return found


def _refusal(name: str, problems: Sequence[Normalization], forced: bool) -> str:
    """Why a backend is not taken; "" if it is."""
    if name == "eager":
        return ""
    if name == "torch":
        return next(filter(None, (_refused_by_torch(problem, forced) for problem in problems)), "")
    if torch.compiler.is_compiling():
        return _refused_as_operator(name, problems, forced)
    if is_transform_active():
        return "a transform or a dispatch mode must see torch's operations"
    return next(filter(None, (KERNELS[name].refusal(problem.tensors) for problem in problems)), "")


def _refused_by_torch(problem: Normalization, forced: bool) -> str:
    if torch.compiler.is_compiling():
        return "a compiler sees the formula"
    if not problem.is_batch_norm_of_each_tensor():
        return "it is not one BatchNorm after the other"
    population = problem.population
    if population is not None and (population.momentum is None or population.total_var is not None):
        return "torch's kernel has no cumulative average of running statistics, nor their total variance"
    buffers = None if population is None else population.mean
    values = [v for v in (problem.weight, problem.bias, buffers) if v is not None]
    for x in problem.tensors:
        if x.shape[0] * math.prod(x.shape[2:]) < 2:
            return "an input has fewer than two values a channel"
        if not torch_mixes(x, values):
            return "torch's kernel does not mix these dtypes"
        if x.is_cpu and x.dtype in (torch.float16, torch.bfloat16) and {v.dtype for v in values} != {torch.float32}:
            return "torch's kernel takes moments of half precision"
        if is_mistaken_by_torch(x):
            return "torch's kernel mistakes its memory format"
        if not forced and not _prefers_torch(x):
            return "C++ is faster"
    return ""


def _prefers_torch(x: Tensor) -> bool:
    """Whether torch's kernel is the fastest one where a normalization batch is `x` and nothing else."""
    return x.numel() < SMALL or math.prod(x.shape[2:]) < SHORT_ROW or bool(native.refusal([x]))


def torch_mixes(x: Tensor, values: Sequence[Tensor]) -> bool:
    """Whether torch's kernel takes weight, bias and buffers with `x`: all of its dtype, or float32 with halves."""
    dtypes = {v.dtype for v in values}
    return dtypes <= {x.dtype} or (dtypes == {torch.float32} and x.dtype in (torch.float16, torch.bfloat16))


def is_mistaken_by_torch(x: Tensor) -> bool:
    """Whether `x` is channels_last but not by its strides, as those of sizes of 1 may be anything.

    `torch.batch_norm` on a CPU takes a contiguous gradient of its output for channels_last then (2.11 to 2.15).
    """
    memory_format = CHANNELS_LAST.get(x.ndim)
    if memory_format is None or 1 not in x.shape or torch.compiler.is_compiling() or x.is_contiguous():
        return False
    if not x.is_contiguous(memory_format=memory_format):
        return False
    expected = x.shape[1]
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if stride != expected:
            return True
        expected *= size
    return x.stride(0) != expected


def _refused_as_operator(name: str, problems: Sequence[Normalization], forced: bool) -> str:
    """In a compiled program the C++ for a large plain BatchNorm is an operator; all else the compiler fuses."""
    if name != "native":
        return "the compiler writes kernels of its own"
    if torch.compiler.is_exporting():  # the compiler of torch 2.11 always says so
        return "an exported program is to run elsewhere"
    for problem in problems:
        if not problem.is_batch_norm():
            return "the compiler fuses what is no plain BatchNorm"
        if not forced and sum(x.numel() for x in problem.tensors) < SMALL_COMPILED:
            return "the compiler is faster on small inputs"
        if reason := native.refusal(problem.tensors):
            return reason
    return ""


def is_batched(grads: Sequence[Tensor]) -> bool:
    """Whether gradients are those of several outputs at once (`is_grads_batched`), or of a transform."""
    functorch = torch._C._functorch
    return is_transform_active() or any(
        functorch.is_functorch_wrapped_tensor(grad) or functorch.is_legacy_batchedtensor(grad) for grad in grads
    )
