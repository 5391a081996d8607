"""torch's own kernel, where a layer is a plain BatchNorm of each tensor, or of groups of it, and that is faster.

Results are then torch's, and so is their precision: in channels_last it sums up in single precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import prefers_batch_norm, prefers_batch_norm_of_groups
from ..moments import Moments
from .domains import DomainBatch, of_domain

if TYPE_CHECKING:
    from .domain_batch_norm import DomainBatchNorm


def suits_torch(layer: DomainBatchNorm, batch: DomainBatch) -> bool:
    """Whether every tensor is a normalization batch of its own, and torch's kernel the faster one for all."""
    domains, one = batch.domains, layer.num_domains == 1
    return (
        layer.plain
        and layer.momentum is not None
        and batch.extra is None
        and (one or layer.sgd_statistics == "per_domain")
        and all(isinstance(domain, int) for domain in domains)
        and len(set(domains)) == len(domains)
        and (one or layer.population_statistics == "per_domain" or list(domains) == sorted(domains))
        and all(
            len(x) * elements > 1 and prefers_batch_norm(x) and _may_mix(x, layer.running_mean)
            for x, elements in zip(batch.tensors, batch.elements, strict=True)
        )
    )


def normalize_by_torch(layer: DomainBatchNorm, batch: DomainBatch) -> list[Tensor]:
    """As `nn.BatchNorm2d`, or one for each tensor; updates the buffers."""
    assert layer.momentum is not None
    outputs = []
    for x, domain in zip(batch.tensors, batch.domains, strict=True):
        values = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        mean, var, weight, bias = (of_domain(v, domain) for v in values)
        if not layer.training:
            mean = var = None
        elif batch.updates:
            tracked = layer.num_batches_tracked
            (tracked[domain] if tracked.ndim else tracked).add_(1)
            # torch saves them for a backward pass that does not need them: another forward before it may move them
            mean, var = mean.data, var.data
        else:  # activation checkpointing compares what is saved: not None
            mean, var = mean.clone(), var.clone()
        outputs.append(F.batch_norm(x, mean, var, weight, bias, True, layer.momentum, layer.eps))
    return outputs


def suits_torch_in_groups(layer: DomainBatchNorm, batch: DomainBatch) -> bool:
    """Whether the samples of one small tensor are normalized channel by channel, in groups or corrected."""
    x, elements = batch.tensors[0], batch.elements[0]
    return (
        layer.per_channel
        and layer.num_domains == len(batch.tensors) == 1
        and isinstance(batch.domains[0], int)
        and batch.extra is None
        and x.dtype == layer.running_mean.dtype
        and prefers_batch_norm_of_groups(x)
        and min(_group_sizes(layer, batch), default=0) * elements > 1
    )


def normalize_groups_by_torch(layer: DomainBatchNorm, batch: DomainBatch) -> list[Tensor]:
    """Each group as `nn.BatchNorm2d` would; updates the buffers with the moments of all."""
    sizes = _group_sizes(layer, batch)
    groups = batch.tensors[0].split(sizes)
    with torch.no_grad():
        stats = [torch.batch_norm_update_stats(x, None, None, 0.0) for x in groups]
        mean, var = (torch.stack(of) for of in zip(*stats, strict=True))
        of = Moments(mean.new_tensor(sizes).mul_(batch.elements[0]).unsqueeze(1), mean, var)  # (G, C)
        total = of.merge(0)
    if layer.training:
        layer._check_counts(batch, total, ranks=1)
    weights, biases = (
        v.expand(len(sizes), -1) if isinstance(v, Tensor) else [v] * len(sizes) for v in layer._affine(batch, total, of)
    )
    outputs = [
        F.batch_norm(x, None, None, weight, bias, True, 0.0, layer.eps)
        for x, weight, bias in zip(groups, weights, biases, strict=True)
    ]
    if layer.training and batch.updates:
        layer._update_population(total)
    return [torch.cat(outputs) if len(outputs) > 1 else outputs[0]]


def _group_sizes(layer: DomainBatchNorm, batch: DomainBatch) -> list[int]:
    number = len(batch.tensors[0])
    return [number] if layer.split is None else layer.split.sizes(number, batch.elements[0])


def _may_mix(x: Tensor, value: Tensor) -> bool:
    """Whether torch's kernel takes both types."""
    return x.dtype == value.dtype or (x.dtype in (torch.float16, torch.bfloat16) and value.dtype == torch.float32)
