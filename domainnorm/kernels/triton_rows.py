"""On a GPU: what `plain` computes, in Triton, of all tensors in one launch.

A program is a row, or a piece of one where there are few rows. What it reads and writes is in one piece of memory.

A kernel is compiled for each number of tensors and each pattern of lengths that are multiples of 16, whose numbers are
read and written in vectors: with images of many sizes a few seconds at a time, until Triton's cache has them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain
from .library import in_layout_of, show
from .plain import scaled

__all__ = ["affine", "gradient", "moments", "scaled", "sums"]

BLOCK = 4096  # elements that a program has under way, at most
PER_WARP = 512  # of them
PROGRAMS = 1024  # that keep a GPU busy


def moments(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """As `plain.moments`, in one pass over each tensor."""
    of = _Rows(xs)
    parts = of.tables(of.pieces)
    of.launch(_moments, *parts)
    if of.pieces == 1:
        return of.shaped(parts)
    merged = of.tables(1)
    of.launch(_merge, *parts, *merged, of.pieces, pieces=1)
    return of.shaped(merged)


def affine(xs: Sequence[Tensor], scale: Tensor, centre: Tensor, shift: Tensor) -> list[Tensor]:
    """As `plain.affine`, in one pass."""
    of, ys = _Rows(xs), tuple(torch.empty_like(x) for x in xs)
    of.launch(_affine, ys, *of.numbers(scale, centre, shift))
    return list(ys)


def sums(grads: Sequence[Tensor], xs: Sequence[Tensor], centre: Tensor) -> tuple[Tensor, Tensor]:
    """As `plain.sums`, in one pass."""
    of = _Rows(xs)
    parts = of.tables(of.pieces)
    of.launch(_sums, of.in_layout(grads), *parts, *of.numbers(centre))
    return of.shaped(parts if of.pieces == 1 else [part.sum(0) for part in parts])


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
    of, outs = _Rows(xs), tuple(torch.empty_like(x) for x in xs)
    of.launch(_gradient, of.in_layout(grads), outs, *of.numbers(scale, centre, to_mean, to_var))
    return list(outs)


class _Rows:
    """The rows of tensors `(N_i, C, *)`, one tensor after the other, and how many programs share one."""

    def __init__(self, xs: Sequence[Tensor]) -> None:
        show(*xs)
        self.xs = tuple(xs)
        self.channels = xs[0].shape[1]
        self.firsts = tuple(itertools.accumulate((x.shape[0] * self.channels for x in xs), initial=0))
        self.lengths = tuple(math.prod(x.shape[2:]) for x in xs)
        longest = max(*self.lengths, 1)
        self.block = min(triton.next_power_of_2(longest), BLOCK)
        self.pieces = min(max(PROGRAMS // max(self.number, 1), 1), triton.cdiv(longest, self.block))

    @property
    def number(self) -> int:
        return self.firsts[-1]

    def tables(self, pieces: int) -> list[Tensor]:
        """Two numbers of each piece of each row."""
        return [self.xs[0].new_empty((pieces, self.number), dtype=torch.float32) for _ in range(2)]

    def shaped(self, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
        first, second = (table.view(-1, self.channels) for table in tables)
        return first, second

    def in_layout(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        show(*grads)
        return tuple(in_layout_of(grad, x) for grad, x in zip(grads, self.xs, strict=True))

    def numbers(self, *values: Tensor) -> list[Any]:
        """Channels, and of each of `(ΣN, C)`, `(1, C)` or `(C,)` where it is and how far a sample is from the next."""
        show(*values)
        of: list[Any] = [self.channels]
        for value in values:
            each = value.ndim == 2 and value.shape[0] > 1
            of += [value.to(torch.float32).expand(*value.shape[:-1], self.channels).contiguous(), each * self.channels]
        return of

    def launch(self, kernel: Any, *others: Any, pieces: int = 0) -> None:
        if self.number:
            warps = max(self.block // PER_WARP, 1)
            with torch.cuda.device_of(self.xs[0]):
                kernel[self.number, pieces or self.pieces](
                    self.xs, self.firsts, self.lengths, *others, BLOCK=self.block, num_warps=warps
                )


@triton.jit
def _span(length, pieces, piece, BLOCK: tl.constexpr):
    """Where a piece of a row begins and ends."""
    each = tl.cdiv(tl.cdiv(length, BLOCK), pieces) * BLOCK
    begin = tl.minimum(piece * each, length)
    return begin, tl.minimum(begin + each, length)


@triton.jit
def _of(row, channels, step):
    """Where the number of a row is."""
    return row // channels * step + row % channels


@triton.jit
def _pivot(x, length):
    """A number of the row: what lies beyond it is small where the mean is large."""
    return tl.load(x, mask=length > 0, other=0.0).to(tl.float32)


@triton.jit
def _moments(xs, firsts, lengths, mean, var, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    place = tl.program_id(1) * tl.num_programs(0) + row
    for k in tl.static_range(len(xs)):
        if (row >= firsts[k]) & (row < firsts[k + 1]):
            x = xs[k] + (row - firsts[k]).to(tl.int64) * lengths[k]
            begin, end = _span(lengths[k], tl.num_programs(1), tl.program_id(1), BLOCK)
            lane = tl.arange(0, BLOCK)
            pivot = _pivot(x, lengths[k])
            centre = tl.zeros([BLOCK], tl.float32)  # of each lane, so that they wait for each other only once
            squares = tl.zeros([BLOCK], tl.float32)
            done = 0.0
            for start in range(begin, end, BLOCK):
                inside = start + lane < end
                value = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32) - pivot
                done += 1
                apart = tl.where(inside, value - centre, 0.0)
                centre += apart / done
                squares += apart * (value - centre)
            count = tl.cdiv(tl.maximum(end - begin - lane, 0), BLOCK).to(tl.float32)
            total = tl.maximum(tl.sum(count), 1.0)
            middle = tl.sum(count * centre) / total
            apart = tl.where(count > 0, centre - middle, 0.0)
            rest = tl.sum(count * apart) / total
            beyond = tl.sum(squares) + tl.sum(count * apart * apart) - total * rest * rest
            whole = tl.num_programs(1) == 1  # else `_merge` adds the pivot
            tl.store(mean + place, middle + rest + tl.where(whole, pivot, 0.0))
            tl.store(var + place, tl.maximum(beyond, 0.0, propagate_nan=tl.PropagateNan.ALL) / total)


@triton.jit
def _merge(xs, firsts, lengths, means, variances, mean, var, pieces, BLOCK: tl.constexpr):
    """The moments of a row in one, from those of its pieces beyond the pivot (Chan et al.)."""
    row = tl.program_id(0)
    for k in tl.static_range(len(xs)):
        if (row >= firsts[k]) & (row < firsts[k + 1]):
            centre = 0.0
            squares = 0.0
            done = 0.0
            for piece in range(pieces):
                begin, end = _span(lengths[k], pieces, piece, BLOCK)
                if end > begin:
                    n = (end - begin).to(tl.float32)
                    place = piece * tl.num_programs(0) + row
                    apart = tl.load(means + place) - centre
                    share = n / (done + n)
                    centre += apart * share
                    squares += tl.load(variances + place) * n + apart * apart * share * done
                    done += n
            pivot = _pivot(xs[k] + (row - firsts[k]).to(tl.int64) * lengths[k], lengths[k])
            tl.store(mean + row, pivot + centre)
            tl.store(var + row, squares / tl.maximum(done, 1.0))


@triton.jit
def _affine(
    xs, firsts, lengths, ys, channels, scale, of_scale, centre, of_centre, shift, of_shift, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    a = tl.load(scale + _of(row, channels, of_scale))
    b = tl.load(shift + _of(row, channels, of_shift))
    c = tl.load(centre + _of(row, channels, of_centre))
    for k in tl.static_range(len(xs)):
        if (row >= firsts[k]) & (row < firsts[k + 1]):
            first = (row - firsts[k]).to(tl.int64) * lengths[k]
            begin, end = _span(lengths[k], tl.num_programs(1), tl.program_id(1), BLOCK)
            for start in range(begin, end, BLOCK):
                at = start + tl.arange(0, BLOCK)
                value = tl.load(xs[k] + first + at, mask=at < end).to(tl.float32)
                tl.store(ys[k] + first + at, a * (value - c) + b, mask=at < end)


@triton.jit
def _sums(xs, firsts, lengths, grads, total, products, channels, centre, of_centre, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    place = tl.program_id(1) * tl.num_programs(0) + row
    c = tl.load(centre + _of(row, channels, of_centre))
    for k in tl.static_range(len(xs)):
        if (row >= firsts[k]) & (row < firsts[k + 1]):
            first = (row - firsts[k]).to(tl.int64) * lengths[k]
            begin, end = _span(lengths[k], tl.num_programs(1), tl.program_id(1), BLOCK)
            of_grad = tl.zeros([BLOCK], tl.float32)
            of_both = tl.zeros([BLOCK], tl.float32)
            for start in range(begin, end, BLOCK):
                at = start + tl.arange(0, BLOCK)
                grad = tl.load(grads[k] + first + at, mask=at < end, other=0.0).to(tl.float32)
                value = tl.load(xs[k] + first + at, mask=at < end, other=0.0).to(tl.float32)
                of_grad += grad
                of_both += tl.where(at < end, grad * (value - c), 0.0)
            tl.store(total + place, tl.sum(of_grad))
            tl.store(products + place, tl.sum(of_both))


@triton.jit
def _gradient(
    xs, firsts, lengths, grads, outs, channels,
    scale, of_scale, centre, of_centre, to_mean, of_mean, to_var, of_var, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    a = tl.load(scale + _of(row, channels, of_scale))
    c = tl.load(centre + _of(row, channels, of_centre))
    for k in tl.static_range(len(xs)):
        if (row >= firsts[k]) & (row < firsts[k + 1]):
            length = tl.maximum(lengths[k], 1)
            b = 2 * tl.load(to_var + _of(row, channels, of_var)) / length
            d = tl.load(to_mean + _of(row, channels, of_mean)) / length
            first = (row - firsts[k]).to(tl.int64) * lengths[k]
            begin, end = _span(lengths[k], tl.num_programs(1), tl.program_id(1), BLOCK)
            for start in range(begin, end, BLOCK):
                at = start + tl.arange(0, BLOCK)
                grad = tl.load(grads[k] + first + at, mask=at < end).to(tl.float32)
                value = tl.load(xs[k] + first + at, mask=at < end).to(tl.float32)
                tl.store(outs[k] + first + at, a * grad + (b * (value - c) + d), mask=at < end)
