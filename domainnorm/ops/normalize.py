"""Normalization of the input of a layer, or of some layers at equal depth, by the fastest backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import sees_operations
from . import eager, fused
from .formula import Normalization, counts
from .moments import Moments, accumulate_dtype
from .operator import normalize_as_operator
from .select import KERNELS, is_mistaken_by_torch, select_backend, torch_mixes


def normalize(problems: Sequence[Normalization]) -> list[list[Tensor]]:
    """The normalized tensors of each of some layers at equal depth; and an update of each one's population statistics.

    Layers that are synchronized share one collective in each direction. `select_backend` says what it is computed with.
    """
    if problems[0].is_constant():
        return [_by_population(problem) for problem in problems]
    backend = select_backend(problems)
    if backend == "torch":
        return [_batch_norm(problem) for problem in problems]
    if backend == "eager" and (problems[0].sync is None or sees_operations()):
        outputs, moments = fused.reference(problems)
    elif torch.compiler.is_compiling():
        outputs, moments = normalize_as_operator(problems)
    else:  # synchronized, eager too: the backward collectives are the same, whatever the other ranks compute with
        own = [problem.by_samples() for problem in problems] if backend == "triton" else problems
        outputs, moments = fused.normalize(KERNELS[backend], own)
    for problem, domains in zip(problems, moments, strict=True):
        if problem.population is not None and domains is not None:
            problem.population.update(domains, problem.counts)
    return outputs


def domain_moments(problem: Normalization) -> Moments:
    """The moments of the domains of an input, `(K, C)`, on this rank: eager, so that whoever watches sees the same."""
    mean, var = eager.moments(problem.tensors, problem.segments)
    own, _ = problem.before_merge(Moments(counts(problem, mean), mean, var))
    return problem.merge_domains(own)


def _by_population(problem: Normalization) -> list[Tensor]:
    """By constants: torch's kernel for inference, where a tensor is of one domain."""
    assert problem.by_population is not None
    mean, var = problem.by_population
    if problem.channels_per_group > 1:
        moments = Moments(torch.ones_like(mean[..., :1]), mean, var)
        if not problem.merged_channels:
            moments = moments.merge_channels(mean.shape[-1] // problem.channels_per_group)
        moments = moments.repeat_channels(problem.channels_per_group)
        mean, var = moments.mean, moments.var
    return [
        _by_constants(x, problem.eps, *(of_domain(v, domain) for v in (mean, var, problem.weight, problem.bias)))
        for x, domain in zip(problem.tensors, problem.domain_of, strict=True)
    ]


def _by_constants(
    x: Tensor, eps: float, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`x` normalized by statistics `(C,)`, or `(N, C)`, with such an affine."""
    values = [v for v in (mean, var, weight, bias) if v is not None]
    if all(v.ndim == 1 for v in values) and x.numel() and torch_mixes(x, values) and not is_mistaken_by_torch(x):
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    mean, var = (v.to(accumulate_dtype(x)) for v in (mean, var))
    scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    rows = (*x.shape[:2], *[1] * (x.ndim - 2))
    scale, shift = (v.expand(x.shape[:2]).reshape(rows) for v in (scale, shift))
    return (x * scale + shift).to(x.dtype)


def of_domain(value: Tensor | None, domain: int | Tensor) -> Any:
    """The row(s) of values `(K, C)` that belong to a domain, or to each of some; values `(C,)` belong to all."""
    return value if value is None or value.ndim == 1 else value[domain]


def _batch_norm(problem: Normalization) -> list[Tensor]:
    """By torch's kernel, which updates the population statistics itself."""
    outputs = []
    for x, domain in zip(problem.tensors, problem.domain_of, strict=True):
        assert isinstance(domain, int)
        weight, bias = (of_domain(v, domain) for v in (problem.weight, problem.bias))
        mean = var = None
        momentum = 0.0
        if problem.population is not None:
            mean, var, tracked = problem.population.of_domain(domain)
            tracked.add_(1)
            # torch saves them for a backward pass that does not need them: another forward before it may move them
            mean, var, momentum = mean.data, var.data, problem.population.momentum or 0.0
        outputs.append(F.batch_norm(x, mean, var, weight, bias, True, momentum, problem.eps))
    return outputs
