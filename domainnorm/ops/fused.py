"""The formula with kernels of segments: each tensor is read once for its moments, and once for its affine.

What lies between is `formula.coefficients`, of a few numbers for each segment and channel. In the backward pass each
tensor is read once for the gradients of its affine, and once for its own gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from ..distributed.collectives import all_reduce_sum
from . import eager
from .formula import Affine, Normalization, coefficients, counts
from .moments import Moments, accumulate_dtype
from .select import is_batched

Outputs = tuple[list[list[Tensor]], list[Moments | None]]  # the tensors of each layer, and the moments of its domains
Gradients = list[tuple[Tensor | None, Tensor | None, list[Tensor]]]  # of each layer's weight, bias and tensors
Leaves = list[list[Tensor | None]]  # of each layer the mean and variance of its segments, weight and bias


def reference(problems: Sequence[Normalization]) -> Outputs:
    """The formula in operations of torch."""
    # once, so that autograd adds up the gradients of both uses before it rounds them to half precision
    wide = [[_as_dtype(x, accumulate_dtype(x)) for x in problem.tensors] for problem in problems]
    segments = [eager.moments(xs, problem.segments) for problem, xs in zip(problems, wide, strict=True)]
    affines, domains = coefficients(problems, segments, [(problem.weight, problem.bias) for problem in problems])
    outputs = []
    for p, xs, a in zip(problems, wide, affines, strict=True):
        ys = eager.affine(xs, p.segments, a.scale, a.center, a.shift)
        outputs.append([_as_dtype(y, x.dtype) for x, y in zip(p.tensors, ys, strict=True)])
    return outputs, [own if own is None else own.detach() for own in domains]


def _as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # torch 2.11 compiles a .to() without effect to no gradient


def normalize(kernels: Any, problems: Sequence[Normalization]) -> Outputs:
    """The same by kernels, differentiable."""
    domains: list[Moments | None] = []
    values = [v for problem in problems for v in (problem.weight, problem.bias, *problem.tensors)]
    recorded = any(v is not None and v.requires_grad for v in values)
    if problems[0].sync is not None and torch.is_grad_enabled() and not recorded:
        # else this rank would miss the backward collective of the others
        values[2] = problems[0].tensors[0].detach().requires_grad_()
    outputs = iter(_Normalize.apply(kernels, problems, domains, *values))
    return [[next(outputs) for _ in problem.tensors] for problem in problems], domains


def forward(kernels: Any, problems: Sequence[Normalization], differentiable: bool) -> tuple[Outputs, Any]:
    """The outputs and moments of each layer, and what `backward` needs."""
    segments = [kernels.moments(problem.tensors, problem.segments) for problem in problems]
    affine = [(problem.weight, problem.bias) for problem in problems]
    leaves: Any = None
    # The gradient of what only batches give is known. That of the rest, SeqNorm and example weighing, autograd finds in
    # a graph of a few numbers, which hooks that offload or drop saved tensors are not for.
    if differentiable and any(p.has_group_norm() or p.by_population is not None for p in problems):
        together = [(*values, *given) for values, given in zip(segments, affine, strict=True)]
        leaves = [[v if v is None else v.detach().requires_grad_() for v in values] for values in together]
        with torch.enable_grad(), saved_tensors_hooks(_unchanged, _unchanged):
            own, given = [(v[0], v[1]) for v in leaves], [(v[2], v[3]) for v in leaves]
            affines, domains = coefficients(problems, own, given)
        domains = [v if v is None else v.detach() for v in domains]
    else:
        affines, domains = coefficients(problems, segments, affine)
    pairs = zip(problems, affines, strict=True)
    outputs = [kernels.affine(p.tensors, p.segments, a.scale, a.center, a.shift) for p, a in pairs]
    return (outputs, domains), (affines, leaves)


def backward(
    kernels: Any, problems: Sequence[Normalization], context: tuple[list[Affine], Leaves | None], grads: Any
) -> Gradients:
    """The gradients of each layer's weight, bias and tensors."""
    affines, leaves = context
    sums = [
        kernels.sums(own, problem.tensors, problem.segments, affine.center)
        for problem, affine, own in zip(problems, affines, grads, strict=True)
    ]
    found = _of_batches(problems, affines, sums) if leaves is None else _of_graph(problems, affines, leaves, sums)
    results = []
    for problem, affine, own, (to_weight, to_bias, center, slope, offset) in zip(
        problems, affines, grads, found, strict=True
    ):
        to_xs = kernels.gradient(own, problem.tensors, problem.segments, affine.scale, center, slope, offset)
        results.append((to_weight, to_bias, to_xs))
    return results


def _of_batches(
    problems: Sequence[Normalization], affines: Sequence[Affine], sums: Sequence[tuple[Tensor, Tensor]]
) -> list[Any]:
    """The gradients of each layer's weight and bias; and the center, the slope and the offset of the tensors' gradient
    `scale · grad + slope · (x - center) + offset`, as in any BatchNorm."""
    to_affine, to_batches = [], []
    for problem, affine, (total, products) in zip(problems, affines, sums, strict=True):
        scale, _, _, batch, factor, d = affine
        assert batch is not None
        to_weight = products * factor if d is None else products * factor + total * d
        pairs = ((problem.weight, to_weight), (problem.bias, total))
        to_affine.append([None if v is None else _of_domains(problem, v, to_v) for v, to_v in pairs])
        # of -mean and of -2 · variance
        to_batch = torch.stack([total, products / (batch.var + problem.eps)]).mul_(scale)
        if problem.channels_per_group > 1:  # before ranks are merged, of which an empty one may have other channels
            to_batch = to_batch.unflatten(-1, (-1, problem.channels_per_group)).sum(-1)
        partition = problem.batches()
        to_batches.append(_sum(to_batch, -2, True) if partition is None else partition.sum(to_batch))
    if problems[0].sync is not None:
        widths = [v.shape[-1] for v in to_batches]
        to_batches = list(all_reduce_sum(torch.cat(to_batches, -1), problems[0].sync[0]).split(widths, -1))
    results = []
    for problem, affine, summed, weight_and_bias in zip(problems, affines, to_batches, to_affine, strict=True):
        partition = problem.batches()
        if problem.channels_per_group > 1:
            summed = summed.repeat_interleave(problem.channels_per_group, -1)
        offset, slope = summed.unbind() if partition is None else map(partition.spread, summed)
        count = affine.batch.count.clamp(min=1).neg_()  # type: ignore[union-attr]
        results.append((*weight_and_bias, affine.center, slope / count, offset / count))
    return results


def _sum(values: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """As `Tensor.sum`, without work where there is one value."""
    if values.shape[dim] == 1:
        return values if keepdim else values.squeeze(dim)
    return values.sum(dim, keepdim)


def _of_domains(problem: Normalization, value: Tensor, to_segments: Tensor) -> Tensor:
    """The gradient of a weight or bias, `(C,)` or `(K, C)`, from those of each segment."""
    return (_sum(to_segments, 0) if value.ndim == 1 else problem.domains.sum(to_segments)).to(value.dtype)


def _of_graph(
    problems: Sequence[Normalization], affines: Sequence[Affine], leaves: Leaves, sums: Sequence[tuple[Tensor, Tensor]]
) -> list[Any]:
    """The same by autograd, from the gradients of each affine."""
    ends: list[tuple[Tensor, Tensor]] = []
    for affine, (total, products) in zip(affines, sums, strict=True):
        of_affine = (products, -(affine.scale.detach() * total), total)
        pairs = zip(affine[:3], of_affine, strict=True)
        ends += [(v, g if len(v) == len(g) else g.sum(0, keepdim=True)) for v, g in pairs if v.requires_grad]
    outputs, to_outputs = zip(*ends, strict=True)
    inputs = [v for own in leaves for v in own if v is not None]
    found = iter(torch.autograd.grad(outputs, inputs, to_outputs, retain_graph=True, materialize_grads=True))
    results = []
    for problem, own in zip(problems, leaves, strict=True):
        mean, _, weight, bias = own
        assert mean is not None
        to_mean, to_var = next(found), next(found)
        to_weight, to_bias = (None if v is None else next(found) for v in (weight, bias))
        count = counts(problem, mean).clamp(min=1)
        results.append((to_weight, to_bias, mean.detach(), 2 * to_var / count, to_mean / count))
    return results


class _Normalize(Function):
    """Weight, bias and tensors of each layer -> normalized tensors; the moments of the domains go to `domains`."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, problems: Any, domains: list[Moments | None], *values: Tensor | None) -> Any:
        (outputs, found), ctx.context = forward(kernels, problems, any(ctx.needs_input_grad))
        domains += found
        ctx.save_for_backward(*values)
        # without the tensors, which autograd keeps
        ctx.kernels, ctx.problems = kernels, _with_values(problems, [None] * len(values))
        return tuple(y for ys in outputs for y in ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        values = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(grads):
            return None, None, None, *_by_reference(ctx.problems, values, grads)
        problems, left = _with_values(ctx.problems, values), iter(grads)
        results = backward(ctx.kernels, problems, ctx.context, [[next(left) for _ in p.tensors] for p in problems])
        return None, None, None, *(v for weight, bias, xs in results for v in (weight, bias, *xs))


def _by_reference(
    problems: Sequence[Normalization], values: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients that are differentiable themselves, or are of many outputs at once."""
    if problems[0].sync is not None:  # also on a rank without elements, whose graph would not reach the collective
        raise RuntimeError("double backward is not implemented for moments merged over ranks: use sync=False")
    with torch.enable_grad():
        # Views: one of the values may be made of another, and its gradient must end here.
        own = [v if v is None else v.view_as(v) for v in values]
        outputs, _ = reference(_with_values(problems, own))
    needed = [v for v in own if v is not None and v.requires_grad]
    ys = [y for of_layer in outputs for y in of_layer]
    found = iter(torch.autograd.grad(ys, needed, grads, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(found) if v is not None and v.requires_grad else None for v in own]


def _with_values(problems: Sequence[Normalization], values: Sequence[Tensor | None]) -> list[Normalization]:
    """The layers with these weights, biases and tensors, one layer after the other."""
    left: Any = iter(values)
    return [p.with_values(next(left), next(left), [next(left) for _ in p.domain_of]) for p in problems]


def _unchanged(x: Tensor) -> Tensor:
    return x
