"""torch's own kernel, where a layer is a plain BatchNorm of each tensor, and that is faster.

Results are then torch's, and so is their precision: in channels_last it sums up in single precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import prefers_batch_norm
from .domains import Domain, DomainBatch, of_domain

if TYPE_CHECKING:
    from .domain_batch_norm import DomainBatchNorm


def suits_torch(layer: DomainBatchNorm, batch: DomainBatch) -> bool:
    """Whether every tensor is a normalization batch of its own, and torch's kernel the faster one for all."""
    if not layer.plain or layer.momentum is None or batch.extra is not None or not _are_apart(layer, batch.domains):
        return False
    running = layer.running_mean
    for x, elements in zip(batch.tensors, batch.elements, strict=True):
        if x.shape[0] * elements < 2 or not prefers_batch_norm(x) or not _may_mix(x, running):
            return False
    return True


def normalize_by_torch(layer: DomainBatchNorm, batch: DomainBatch) -> list[Tensor]:
    """As `nn.BatchNorm2d`, or one for each tensor; updates the buffers."""
    assert layer.momentum is not None
    outputs = []
    for x, domain in zip(batch.tensors, batch.domains, strict=True):
        values: Sequence[Any] = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        if layer.num_domains > 1:
            values = [of_domain(value, domain) for value in values]
        mean, var, weight, bias = values
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


def _are_apart(layer: DomainBatchNorm, domains: Sequence[Domain]) -> bool:
    """Whether tensors of these domains are normalized one by one, and the statistics move in their order."""
    one = layer.num_domains == 1
    if one and len(domains) == 1:
        return isinstance(domains[0], int)
    return (
        (one or layer.sgd_statistics == "per_domain")
        and all(isinstance(domain, int) for domain in domains)
        and len(set(domains)) == len(domains)
        and (one or layer.population_statistics == "per_domain" or list(domains) == sorted(domains))
    )


def _may_mix(x: Tensor, value: Tensor) -> bool:
    """Whether torch's kernel takes both types."""
    return x.dtype == value.dtype or (x.dtype in (torch.float16, torch.bfloat16) and value.dtype == torch.float32)
