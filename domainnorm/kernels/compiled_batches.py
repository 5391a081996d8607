"""On a CPU: whole normalization batches, in C++. The layers' own merges of rows are the reference."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import library
from .library import call, like, numbers, part, show, wide

# Means and variances, `(2, …)` each: of channels, `(groups, C)` or of all groups together `(1, C)`, which are counted;
# of the batches, `(groups, C / width)`; and for a SeqNorm of the rows, and of its first batches.
Tables = tuple[Tensor, ...]


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
    def of(
        groups: tuple[int, ...], sizes: tuple[int, ...], lengths: tuple[int, ...], number: int, *others: Any
    ) -> Batches:
        """Of so many neighbouring samples of such lengths, in these of `number` groups; and the other attributes."""
        counts = [0] * number
        for group, size, length in zip(groups, sizes, lengths, strict=True):
            counts[group] += size * length
        samples = (group for group, size in zip(groups, sizes, strict=True) for _ in range(size))
        return Batches(tuple(samples), tuple(counts), *others)

    @functools.cached_property
    def array(self) -> ctypes.Array[ctypes.c_int64] | None:
        """`group` in memory; None where there is one only."""
        return None if len(self.counts) == 1 else (ctypes.c_int64 * len(self.group))(*self.group)


def read(xs: Sequence[Tensor], batches: Batches) -> Tables:
    """The moments by which `normalize` does it."""
    tables = _empty_tables(xs, batches)
    parts = [part(x, last=_last(xs)) for x in xs]
    call("normalize", xs, parts, *_given(xs, batches, None, None, 0.0, tables, fill=True))
    return tables


def normalize(
    xs: Sequence[Tensor],
    batches: Batches,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tables: Tables | None = None,
) -> tuple[list[Tensor], Tables]:
    """`xs` normalized by `tables`, or by their own moments, which are returned too; γ and β `(C,)` or of rows."""
    known, tables = tables is not None, tables or _empty_tables(xs, batches)
    ys = [torch.empty_like(x) for x in xs]
    parts = [part(x, out=y, last=_last(xs)) for x, y in zip(xs, ys, strict=True)]
    given = _given(xs, batches, weight, bias, eps, tables, fill=not known, use=True)
    call("sequence" if batches.first else "normalize", xs, parts, *given)
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
    shape = (sum(map(len, xs)), xs[0].shape[1]) if of_rows else xs[0].shape[1:2]
    to_weight, to_bias = (torch.zeros(shape, dtype=wide(xs[0])) for _ in range(2))
    outs = [torch.empty_like(x) for x in xs]
    grads = [like(grad, x) for grad, x in zip(grads, xs, strict=True)]
    parts = [part(x, grad, out, _last(xs)) for grad, x, out in zip(grads, xs, outs, strict=True)]
    given = _given(xs, batches, weight, bias, eps, tables)
    function = "sequence_gradient" if batches.first else "normalize_gradient"
    call(function, xs, parts, *given, to_weight.data_ptr(), to_bias.data_ptr())
    return outs, to_weight, to_bias


def _last(xs: Sequence[Tensor]) -> bool:
    """Whether `xs` are gone through with the channels of each place together: an empty one lies in both ways."""
    return not all(x.is_contiguous() for x in xs) or all(math.prod(x.shape[2:]) == 1 for x in xs)


def _given(
    xs: Sequence[Tensor],
    batches: Batches,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tables: Tables,
    fill: bool = False,
    use: bool = False,
) -> tuple[Any, ...]:
    show(*tables)
    groups, width = len(batches.counts), batches.first or batches.width
    of = library.Batches(batches.array, groups, width, batches.together, eps)
    # one table of channels may be that of the batches
    at = [v.data_ptr() for v in (tables * 2 if len(tables) == 1 else tables)]
    return of, numbers(weight, xs), numbers(bias, xs), library.Tables(*at, *[None] * (4 - len(at)), fill, use)


def _empty_tables(xs: Sequence[Tensor], batches: Batches) -> Tables:
    rows, channels, dtype = sum(map(len, xs)), xs[0].shape[1], wide(xs[0])
    counted = (1 if batches.together else len(batches.counts), channels)
    of_batches = (len(batches.counts), channels // batches.width)
    if batches.first:
        # what a GroupNorm leaves of a few numbers may vary little: in double precision it still does
        shapes = [(counted, dtype), (of_batches, torch.float64)]
        shapes += [((rows, channels), dtype), ((rows, channels // batches.first), dtype)]
    else:
        shapes = [(counted, dtype)] * (1 if counted == of_batches else 2)
        shapes[-1] = (of_batches, dtype)
    return tuple(torch.empty(2, *shape, dtype=of) for shape, of in shapes)
