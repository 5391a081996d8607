"""On a CPU: whole normalization batches, in C++. The layers' own merges of rows are the reference."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import library
from .library import call, in_layout_of, is_last, keeping, numbers, parts, show, wide


class Tables(NamedTuple):
    """Means and variances `(2, …)`.

    Attributes:
        counted: of channels, `(groups, C)` or of all groups together `(1, C)`.
        batches: of the batches, `(groups, C / width)`; may be `counted`.
        rows, first: of a SeqNorm's rows, and of its first batches.
        corrections: r and d of a Batch Renorm, `(groups, C)`.
    """

    counted: Tensor
    batches: Tensor
    rows: Tensor | None = None
    first: Tensor | None = None
    corrections: Tensor | None = None


class Towards(NamedTuple):
    """What a Batch Renorm corrects its batches towards.

    Attributes:
        mean, var: of the population, `(C,)`, or of each group, `(groups, C)`.
        r_max, d_max: of each group.
    """

    mean: Tensor
    var: Tensor
    r_max: Sequence[float]
    d_max: Sequence[float]


@dataclass(frozen=True)
class Batches:
    """Which rows of tensors `(N_i, C, *)` are normalized together: samples of a group, by neighbouring channels.

    It is all of Python's numbers: to know them waits for nothing, and they can be kept.

    Attributes:
        group: of each of the ΣN samples of all tensors, in [0, len(counts)).
        counts: of each group, the numbers that a channel has.
        width: channels of a normalization batch; divides C.
        together: whether what is counted is of all groups in one.
        first: channels of the GroupNorm that comes first in a SeqNorm, where width is 1; 0: none does.
    """

    group: tuple[int, ...]
    counts: tuple[int, ...]
    width: int = 1
    together: bool = False
    first: int = 0

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(groups: tuple[int, ...], shapes: tuple[tuple[int, ...], ...], number: int, *others: Any) -> Batches:
        """Of neighbouring samples, `(N_i, C, *)` in each of these of `number` groups; and the other attributes."""
        counts = [0] * number
        for group, shape in zip(groups, shapes, strict=True):
            counts[group] += shape[0] * math.prod(shape[2:])
        samples = (group for group, shape in zip(groups, shapes, strict=True) for _ in range(shape[0]))
        return Batches(tuple(samples), tuple(counts), *others)

    @property
    def ids(self) -> Tensor:
        """`group` as a LongTensor."""
        return torch.tensor(self.group, dtype=torch.long)

    @functools.cached_property
    def array(self) -> ctypes.Array[ctypes.c_int64] | None:
        """`group` in memory; None where there is one only."""
        return None if len(self.counts) == 1 else (ctypes.c_int64 * len(self.group))(*self.group)


def read(xs: Sequence[Tensor], batches: Batches) -> Tables:
    """The moments by which `normalize` does it."""
    tables = _empty_tables(xs, batches)
    given = _given(xs, batches, None, None, 0.0, tables, write=False)
    call("normalize", xs, parts(xs, last=_last(xs)), *given, library.Towards())
    return tables


def normalize(
    xs: Sequence[Tensor],
    batches: Batches,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    towards: Towards | None = None,
) -> tuple[list[Tensor], Tables]:
    """`xs` normalized by their moments, which are returned too; γ and β `(C,)` or of rows."""
    tables = _empty_tables(xs, batches)
    if towards is not None:
        tables = tables._replace(corrections=torch.empty(2, len(batches.counts), xs[0].shape[1], dtype=wide(xs[0])))
    ys = [torch.empty_like(x) for x in xs]
    of, given = parts(xs, ys, last=_last(xs)), _given(xs, batches, weight, bias, eps, tables)
    if batches.first:
        call("sequence", xs, of, *given)
    else:
        call("normalize", xs, of, *given, _towards(xs, batches, towards))
    return ys, tables


def gradient(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    batches: Batches,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tables: Tables,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of `xs`, of γ and of β: `(ΣN, C)` where one of the two is of rows, else `(C,)`."""
    of_rows = any(v is not None and v.ndim == 2 and len(v) > 1 for v in (weight, bias))
    shape = (len(batches.group), xs[0].shape[1]) if of_rows else xs[0].shape[1:2]
    to_weight, to_bias = (torch.zeros(shape, dtype=wide(xs[0])) for _ in range(2))
    outs = [torch.empty_like(x) for x in xs]
    grads = [in_layout_of(grad, x) for grad, x in zip(grads, xs, strict=True)]
    of, given = parts(xs, outs, grads, _last(xs)), _given(xs, batches, weight, bias, eps, tables)
    function = "sequence_gradient" if batches.first else "normalize_gradient"
    call(function, xs, of, *given, to_weight.data_ptr(), to_bias.data_ptr())
    return outs, to_weight, to_bias


def _last(xs: Sequence[Tensor]) -> bool:
    """Whether `xs`, all in one layout, are gone through with the channels of each place together."""
    for x in xs:
        if not x.is_contiguous():
            return True
        if not is_last(x) and math.prod(x.shape[2:]) > 1:
            return False
    return all(math.prod(x.shape[2:]) == 1 for x in xs)


def _given(
    xs: Sequence[Tensor],
    batches: Batches,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tables: Tables,
    write: bool = True,
) -> tuple[Any, ...]:
    show(*tables)
    groups, width = len(batches.counts), batches.first or batches.width
    of = library.Batches(batches.array, groups, width, batches.together, eps)
    at = [None if v is None else v.data_ptr() for v in tables]
    return of, numbers(weight, xs), numbers(bias, xs), library.Tables(*at, write)


def _towards(xs: Sequence[Tensor], batches: Batches, towards: Towards | None) -> library.Towards:
    if towards is None:
        return library.Towards()
    limits = ((ctypes.c_double * len(batches.counts))(*limit) for limit in (towards.r_max, towards.d_max))
    return keeping(library.Towards, numbers(towards.mean, xs), numbers(towards.var, xs), *limits)


def _empty_tables(xs: Sequence[Tensor], batches: Batches) -> Tables:
    channels, dtype = xs[0].shape[1], wide(xs[0])
    counted = (1 if batches.together else len(batches.counts), channels)
    of_batches = (len(batches.counts), channels // batches.width)
    if batches.first:
        rows = len(batches.group)
        return Tables(
            torch.empty(2, *counted, dtype=dtype),
            # what a GroupNorm leaves of a few numbers may vary little: in double precision it still does
            torch.empty(2, *of_batches, dtype=torch.float64),
            torch.empty(2, rows, channels, dtype=dtype),
            torch.empty(2, rows, channels // batches.first, dtype=dtype),
        )
    own = torch.empty(2, *of_batches, dtype=dtype)
    return Tables(own if counted == of_batches else torch.empty(2, *counted, dtype=dtype), own)
