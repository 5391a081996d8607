"""On a CPU: whole normalization batches, in C++. The layers' own merges of rows are the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import library
from .library import call, like, numbers, part, wide

if TYPE_CHECKING:
    from ..batches import Batches

# Means and variances: of channels, `(groups, C)` or of all groups together `(1, C)`, which are counted; of the batches,
# `(groups, C / width)`; and for a SeqNorm of the rows, and of its first batches.
Tables = tuple[Tensor, ...]


def read(xs: Sequence[Tensor], batches: Batches) -> Tables:
    """The moments by which `normalize` does it."""
    tables = _empty_tables(xs, batches)
    call("normalize", xs, [part(x) for x in xs], *_given(xs, batches, None, None, 0.0, tables, fill=True))
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
    parts = [part(x, out=y) for x, y in zip(xs, ys, strict=True)]
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
    """Gradients of `xs`, and of γ and β, of rows where one of them is of rows, else of groups."""
    of_rows = any(v is not None and v.ndim == 2 and len(v) > 1 for v in (weight, bias))
    shape = (2, sum(map(len, xs)) if of_rows else len(batches.counts), xs[0].shape[1])
    to_weight, to_bias = torch.zeros(shape, dtype=wide(xs[0])).unbind()
    outs = [torch.empty_like(x) for x in xs]
    grads = [like(grad, x) for grad, x in zip(grads, xs, strict=True)]
    parts = [part(x, grad, out) for grad, x, out in zip(grads, xs, outs, strict=True)]
    given = _given(xs, batches, weight, bias, eps, tables)
    function = "sequence_gradient" if batches.first else "normalize_gradient"
    call(function, xs, parts, *given, to_weight.data_ptr(), to_bias.data_ptr())
    return outs, to_weight, to_bias


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
    groups, width = len(batches.counts), batches.first or batches.width
    of = library.Batches(batches.array, groups, width, batches.together, eps)
    pointers = [v.data_ptr() for v in tables] + [None] * (8 - len(tables))
    return of, numbers(weight, xs), numbers(bias, xs), library.Tables(*pointers, fill, use)


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
    pairs = [torch.empty(2, *shape, dtype=of).unbind() for shape, of in shapes]
    if len(pairs) == 1:
        pairs *= 2
    return tuple(table for pair in pairs for table in pair)
