"""A BatchNorm's batches within `torch.compile`: an operator that the compiler calls, and does not look into."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import define, impl, register_fake

from ..batches import like
from ..kernels import compiled_batches as kernel
from ..kernels import prefers_operator
from ..kernels.compiled_batches import Batches, Tables
from ..moments import Moments
from .by_batch import groups_of
from .domains import DomainBatch

if TYPE_CHECKING:
    from .domain_batch_norm import DomainBatchNorm


def suits_operator(layer: DomainBatchNorm, batch: DomainBatch) -> bool:
    """Whether each normalization batch is one domain of this rank, or all, and the operator is the faster way."""
    return layer.plain and groups_of(layer, batch) is not None and prefers_operator(batch.tensors)


def normalize_by_operator(layer: DomainBatchNorm, batch: DomainBatch) -> list[Tensor]:
    """As `normalize_by_batch`."""
    found = groups_of(layer, batch)
    assert found is not None
    groups, number = found
    sizes: list[float] = [0] * number
    for group, x in zip(groups, batch.tensors, strict=True):
        sizes[group] = sizes[group] + x.shape[0] * math.prod(x.shape[2:])
    if layer.training:
        layer._check_counts(batch, lambda: sizes, ranks=1)
    weight, bias = layer._of_rows(layer.weight, batch), layer._of_rows(layer.bias, batch)
    *outputs, moments = _Normalize.apply(list(groups), number, layer.eps, weight, bias, *batch.tensors)
    if layer.training and batch.updates:
        mean, var = moments.detach().unbind()
        counts = torch.cat([mean.new_full((1, 1), size) for size in sizes])
        layer._update_population(Moments(counts, mean, var))
    return outputs


class _Normalize(Function):
    """The operator, differentiable: a formula registered with it would cost every call of the compiled program."""

    @staticmethod
    def forward(ctx, groups, number, eps, weight, bias, *xs):
        *ys, moments = torch.ops.domainnorm.normalize(xs, weight, bias, groups, number, eps)
        ctx.mark_non_differentiable(moments)
        ctx.save_for_backward(weight, bias, moments, *xs)
        ctx.groups, ctx.eps = groups, eps
        return (*ys, moments)

    @staticmethod
    def backward(ctx, *grads):
        weight, bias, moments, *xs = ctx.saved_tensors
        args = (grads[:-1], xs, moments, weight, bias, ctx.groups, ctx.eps)
        *dxs, to_weight, to_bias = torch.ops.domainnorm.normalize_gradient(*args)
        return None, None, None, like(to_weight, weight), like(to_bias, bias), *dxs


def _batches(xs: list[Tensor], groups: list[int], number: int) -> Batches:
    return Batches.of(tuple(groups), tuple([x.shape for x in xs]), number)


define(
    "domainnorm::normalize",
    "(Tensor[] xs, Tensor? weight, Tensor? bias, int[] groups, int number, float eps) -> Tensor[]",
)
define(
    "domainnorm::normalize_gradient",
    "(Tensor[] grads, Tensor[] xs, Tensor moments, Tensor? weight, Tensor? bias, int[] groups, float eps) -> Tensor[]",
)


@impl("domainnorm::normalize", "CPU")
def _normalize(xs, weight, bias, groups, number, eps):
    """Each tensor normalized; last the means and variances `(2, number, C)`."""
    ys, tables = kernel.normalize(xs, _batches(xs, groups, number), weight, bias, eps)
    return [*ys, tables.counted]


@register_fake("domainnorm::normalize")
def _(xs, weight, bias, groups, number, eps):
    return [*map(torch.empty_like, xs), xs[0].new_empty((2, number, xs[0].shape[1]), dtype=kernel.wide(xs[0]))]


@impl("domainnorm::normalize_gradient", "CPU")
def _gradient(grads, xs, moments, weight, bias, groups, eps):
    """Of each tensor; last of γ and of β, `(C,)`, or `(ΣN, C)` where they are of rows."""
    batches = _batches(xs, groups, moments.shape[1])
    dxs, *affine = kernel.gradient(grads, xs, batches, weight, bias, eps, Tables(moments, moments))
    return [*dxs, *affine]


@register_fake("domainnorm::normalize_gradient")
def _(grads, xs, moments, weight, bias, groups, eps):
    of_rows = weight is not None and weight.ndim == 2 and weight.shape[0] > 1
    shape = weight.shape if of_rows else xs[0].shape[1:2]
    return [*map(torch.empty_like, xs), moments.new_empty(shape), moments.new_empty(shape)]
