"""The kernels: a program is a row (a sample's channel), or a piece of one where there are few rows.

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

from ..moments import is_in_memory

BLOCK = 4096  # elements that a program has under way, at most
PER_WARP = 512  # of them
PROGRAMS = 1024  # that keep a GPU busy


def moments(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean and the biased variance of each row of tensors `(N_i, C, *)`, `(ΣN, C)`."""
    rows = _Rows(xs)
    parts = rows.tables(rows.pieces)
    rows.launch(_moments, *parts)
    if rows.pieces == 1:
        return rows.shaped(parts)
    merged = rows.tables(1)
    rows.launch(_merge, *parts, *merged, rows.pieces, pieces=1)
    return rows.shaped(merged)


def affine(xs: Sequence[Tensor], scale: Tensor, center: Tensor, shift: Tensor) -> list[Tensor]:
    """`scale · (x - center) + shift`, with values `(ΣN, C)`, `(1, C)` or `(C,)`."""
    rows, ys = _Rows(xs), tuple(torch.empty_like(x) for x in xs)
    rows.launch(_affine, ys, *rows.values(scale, center, shift))
    return list(ys)


def sums(grads: Sequence[Tensor], xs: Sequence[Tensor], center: Tensor) -> tuple[Tensor, Tensor]:
    """Σ grad and Σ grad · (x - center) of each row, `(ΣN, C)`."""
    rows = _Rows(xs)
    parts = rows.tables(rows.pieces)
    rows.launch(_sums, rows.in_layout(grads), *parts, *rows.values(center))
    return rows.shaped(parts if rows.pieces == 1 else [part.sum(0) for part in parts])


def gradient(
    grads: Sequence[Tensor], xs: Sequence[Tensor], scale: Tensor, center: Tensor, slope: Tensor, offset: Tensor
) -> list[Tensor]:
    """`scale · grad + slope · (x - center) + offset`."""
    rows, outs = _Rows(xs), tuple(torch.empty_like(x) for x in xs)
    rows.launch(_gradient, rows.in_layout(grads), outs, *rows.values(scale, center, slope, offset))
    return list(outs)


class _Rows:
    """The rows of tensors `(N_i, C, *)`, one tensor after the other, and how many programs share one."""

    def __init__(self, xs: Sequence[Tensor]) -> None:
        self.xs = tuple(xs)
        self.channels = xs[0].shape[1]
        self.firsts = tuple(itertools.accumulate((x.shape[0] * self.channels for x in xs), initial=0))
        self.lengths = tuple(math.prod(x.shape[2:]) for x in xs)
        self.number = self.firsts[-1]
        longest = max(*self.lengths, 1)
        self.block = min(triton.next_power_of_2(longest), BLOCK)
        self.pieces = min(max(PROGRAMS // max(self.number, 1), 1), triton.cdiv(longest, self.block))

    def tables(self, pieces: int) -> list[Tensor]:
        """Two numbers of each piece of each row."""
        return [self.xs[0].new_empty((pieces, self.number), dtype=torch.float32) for _ in range(2)]

    def shaped(self, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Tables of one number of each row, as `(ΣN, C)`."""
        first, second = (table.view(-1, self.channels) for table in tables)
        return first, second

    def in_layout(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients in the dtype and memory format of the tensors."""
        pairs = zip(grads, self.xs, strict=True)
        return tuple(
            grad
            if grad.dtype == x.dtype and grad.is_contiguous() and is_in_memory(grad)
            else torch.empty_like(x).copy_(grad)
            for grad, x in pairs
        )

    def values(self, *values: Tensor) -> list[Any]:
        """The channels; then each of the values, and the distance from one sample's to the next.

        Raises:
            RuntimeError: another shape, which a kernel would not notice.
        """
        channels, samples = self.channels, self.number // self.channels
        found: list[Any] = [channels]
        for value in values:
            if value.shape != (samples, channels) and value.shape != (1, channels) and value.shape != (channels,):
                raise RuntimeError(f"expected values for {samples} x {channels} rows, got {tuple(value.shape)}")
            step = channels if value.ndim == 2 and value.shape[0] > 1 else 0
            found += [value.detach().to(torch.float32).contiguous().resolve_neg(), step]
        return found

    def launch(self, kernel: Any, *others: Any, pieces: int = 0) -> None:
        """Start a program for each piece of each row."""
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
def _place(row, channels, step):
    """Where the value of a row is."""
    return row // channels * step + row % channels


@triton.jit
def _pivot(x, length):
    """The first number of a row: the distance of the others from it is small where the mean is large."""
    return tl.load(x, mask=length > 0, other=0.0).to(tl.float32)


@triton.jit
def _moments(xs, firsts, lengths, means, variances, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    piece = tl.program_id(1)
    pieces = tl.num_programs(1)
    place = piece * tl.num_programs(0) + row
    for k in tl.static_range(len(xs)):
        if (row >= firsts[k]) & (row < firsts[k + 1]):
            x = xs[k] + (row - firsts[k]).to(tl.int64) * lengths[k]
            begin, end = _span(lengths[k], pieces, piece, BLOCK)
            lane = tl.arange(0, BLOCK)
            pivot = _pivot(x, lengths[k])
            lane_mean = tl.zeros([BLOCK], tl.float32)  # of each lane, so that they wait for each other only once
            lane_squares = tl.zeros([BLOCK], tl.float32)
            blocks = 0.0
            for start in range(begin, end, BLOCK):
                inside = start + lane < end
                value = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32) - pivot
                blocks += 1
                delta = tl.where(inside, value - lane_mean, 0.0)
                lane_mean += delta / blocks
                lane_squares += delta * (value - lane_mean)
            weight = tl.cdiv(tl.maximum(end - begin - lane, 0), BLOCK).to(tl.float32)  # numbers of each lane
            count = tl.maximum(tl.sum(weight), 1.0)
            mean = tl.sum(weight * lane_mean) / count
            delta = tl.where(weight > 0, lane_mean - mean, 0.0)
            rest = tl.sum(weight * delta) / count  # what rounding left of the mean
            squares = tl.sum(lane_squares) + tl.sum(weight * delta * delta) - count * rest * rest
            tl.store(means + place, mean + rest + tl.where(pieces == 1, pivot, 0.0))  # else `_merge` adds the pivot
            tl.store(variances + place, tl.maximum(squares, 0.0, propagate_nan=tl.PropagateNan.ALL) / count)


@triton.jit
def _merge(xs, firsts, lengths, piece_means, piece_variances, means, variances, pieces, BLOCK: tl.constexpr):
    """The moments of a row, from those of its pieces, whose means are distances from the pivot (Chan et al.)."""
    row = tl.program_id(0)
    for k in tl.static_range(len(xs)):
        if (row >= firsts[k]) & (row < firsts[k + 1]):
            mean = 0.0
            squares = 0.0
            count = 0.0
            for piece in range(pieces):
                begin, end = _span(lengths[k], pieces, piece, BLOCK)
                if end > begin:
                    n = (end - begin).to(tl.float32)
                    place = piece * tl.num_programs(0) + row
                    delta = tl.load(piece_means + place) - mean
                    weight = n / (count + n)
                    mean += delta * weight
                    squares += tl.load(piece_variances + place) * n + delta * delta * weight * count
                    count += n
            pivot = _pivot(xs[k] + (row - firsts[k]).to(tl.int64) * lengths[k], lengths[k])
            tl.store(means + row, pivot + mean)
            tl.store(variances + row, squares / tl.maximum(count, 1.0))


@triton.jit
def _affine(
    xs, firsts, lengths, ys, channels,
    scales, scale_step, centers, center_step, shifts, shift_step, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    scale = tl.load(scales + _place(row, channels, scale_step))
    center = tl.load(centers + _place(row, channels, center_step))
    shift = tl.load(shifts + _place(row, channels, shift_step))
    for k in tl.static_range(len(xs)):
        if (row >= firsts[k]) & (row < firsts[k + 1]):
            first = (row - firsts[k]).to(tl.int64) * lengths[k]
            begin, end = _span(lengths[k], tl.num_programs(1), tl.program_id(1), BLOCK)
            for start in range(begin, end, BLOCK):
                at = start + tl.arange(0, BLOCK)
                value = tl.load(xs[k] + first + at, mask=at < end).to(tl.float32)
                tl.store(ys[k] + first + at, scale * (value - center) + shift, mask=at < end)


@triton.jit
def _sums(xs, firsts, lengths, grads, totals, products, channels, centers, center_step, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    place = tl.program_id(1) * tl.num_programs(0) + row
    center = tl.load(centers + _place(row, channels, center_step))
    for k in tl.static_range(len(xs)):
        if (row >= firsts[k]) & (row < firsts[k + 1]):
            first = (row - firsts[k]).to(tl.int64) * lengths[k]
            begin, end = _span(lengths[k], tl.num_programs(1), tl.program_id(1), BLOCK)
            total = tl.zeros([BLOCK], tl.float32)
            product = tl.zeros([BLOCK], tl.float32)
            for start in range(begin, end, BLOCK):
                at = start + tl.arange(0, BLOCK)
                grad = tl.load(grads[k] + first + at, mask=at < end, other=0.0).to(tl.float32)
                value = tl.load(xs[k] + first + at, mask=at < end, other=0.0).to(tl.float32)
                total += grad
                product += tl.where(at < end, grad * (value - center), 0.0)
            tl.store(totals + place, tl.sum(total))
            tl.store(products + place, tl.sum(product))


@triton.jit
def _gradient(
    xs, firsts, lengths, grads, outs, channels,
    scales, scale_step, centers, center_step, slopes, slope_step, offsets, offset_step, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    scale = tl.load(scales + _place(row, channels, scale_step))
    center = tl.load(centers + _place(row, channels, center_step))
    slope = tl.load(slopes + _place(row, channels, slope_step))
    offset = tl.load(offsets + _place(row, channels, offset_step))
    for k in tl.static_range(len(xs)):
        if (row >= firsts[k]) & (row < firsts[k + 1]):
            first = (row - firsts[k]).to(tl.int64) * lengths[k]
            begin, end = _span(lengths[k], tl.num_programs(1), tl.program_id(1), BLOCK)
            for start in range(begin, end, BLOCK):
                at = start + tl.arange(0, BLOCK)
                grad = tl.load(grads[k] + first + at, mask=at < end).to(tl.float32)
                value = tl.load(xs[k] + first + at, mask=at < end).to(tl.float32)
                tl.store(outs[k] + first + at, scale * grad + (slope * (value - center) + offset), mask=at < end)
