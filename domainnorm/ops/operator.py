"""A large plain BatchNorm within `torch.compile`: an operator that the compiler calls, and does not look into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import define, impl, register_fake

from . import native
from .formula import Affine, Normalization, coefficients, counts
from .fused import Outputs, backward
from .moments import Moments, accumulate_dtype
from .partition import Partition


def normalize_as_operator(problems: Sequence[Normalization]) -> Outputs:
    """As `fused.reference`, for layers that are plain BatchNorms of the domains of this rank."""
    outputs: list[list[Tensor]] = []
    domains: list[Moments | None] = []
    for problem in problems:
        options = (list(problem.domain_of), problem.domains.num_sets, problem.shared, problem.eps)
        values = (problem.weight, problem.bias, *problem.tensors)
        # the compiler of torch 2.14 mistakes the arguments of a Function that no gradient is asked of
        recorded = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in values)
        *ys, mean, var = _BatchNorm.apply(options, *values) if recorded else _call(options, values)
        outputs.append(ys)
        domains.append(problem.merge_domains(Moments(counts(problem, mean), mean.detach(), var.detach())))
    return outputs, domains


class _BatchNorm(Function):
    """The operator, differentiable: a formula registered with it would cost every call of the compiled program."""

    @staticmethod
    def forward(ctx: Any, options: Any, *values: Tensor | None) -> Any:
        *ys, mean, var = _call(options, values)
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(mean, var, *values)
        ctx.options = options
        return (*ys, mean, var)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        mean, var, weight, bias, *xs = ctx.saved_tensors
        args = (grads[:-2], xs, mean, var, weight, bias, *ctx.options)
        *to_xs, to_weight, to_bias = torch.ops.domainnorm.batch_norm_backward(*args)
        return None, None if weight is None else to_weight, None if bias is None else to_bias, *to_xs


def _call(options: Any, values: Sequence[Tensor | None]) -> list[Tensor]:
    weight, bias, *xs = values
    return torch.ops.domainnorm.batch_norm(xs, weight, bias, *options)


define(
    "domainnorm::batch_norm",
    "(Tensor[] xs, Tensor? weight, Tensor? bias, int[] domains, int num_domains, bool shared, float eps) -> Tensor[]",
)
define(
    "domainnorm::batch_norm_backward",
    "(Tensor[] grads, Tensor[] xs, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, int[] domains, "
    "int num_domains, bool shared, float eps) -> Tensor[]",
)


@impl("domainnorm::batch_norm", "CPU")
def _batch_norm(xs: Any, weight: Any, bias: Any, *options: Any) -> list[Tensor]:
    """Each tensor normalized; then the mean and variance of each tensor, `(S, C)`."""
    xs = [x.resolve_neg() for x in xs]
    problem = _problem(xs, weight, bias, *options)
    mean, var = native.moments(xs, problem.segments)
    affine = _affine(problem, mean, var)
    return [*native.affine(xs, problem.segments, *affine[:3]), mean, var]


@register_fake("domainnorm::batch_norm")
def _(xs: Any, weight: Any, bias: Any, *options: Any) -> list[Tensor]:
    shape, dtype = (len(xs), xs[0].shape[1]), accumulate_dtype(xs[0])
    return [*map(torch.empty_like, xs), *(xs[0].new_empty(shape, dtype=dtype) for _ in range(2))]


@impl("domainnorm::batch_norm_backward", "CPU")
def _batch_norm_backward(
    grads: Any, xs: Any, mean: Tensor, var: Tensor, weight: Any, bias: Any, *options: Any
) -> list[Tensor]:
    """The gradients of each tensor; then those of weight and bias, or two numbers where there are none."""
    xs = [x.resolve_neg() for x in xs]
    problem = _problem(xs, weight, bias, *options)
    context = ([_affine(problem, mean, var)], None)
    ((to_weight, to_bias, to_xs),) = backward(native, [problem], context, [grads])
    return [*to_xs, *(mean.new_zeros(()) if v is None else v for v in (to_weight, to_bias))]


@register_fake("domainnorm::batch_norm_backward")
def _(grads: Any, xs: Any, mean: Tensor, var: Tensor, weight: Any, bias: Any, *options: Any) -> list[Tensor]:
    affine = (mean.new_empty(()) if v is None else torch.empty_like(v) for v in (weight, bias))
    return [*map(torch.empty_like, xs), *affine]


def _affine(problem: Normalization, mean: Tensor, var: Tensor) -> Affine:
    """That of each tensor, with this mean and variance."""
    (affine,), _ = coefficients([problem], [(mean, var)], [(problem.weight, problem.bias)])
    return affine


def _problem(
    xs: list[Tensor], weight: Any, bias: Any, domains: list[int], num_domains: int, shared: bool, eps: float
) -> Normalization:
    partition = Partition(num_domains, [(domain, 1) for domain in domains])
    return Normalization(xs, [[len(x)] for x in xs], domains, partition, weight, bias, eps, shared)
