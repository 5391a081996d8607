"""torch's own kernel, where a layer is a plain BatchNorm of each tensor, and that is faster.

Results are then torch's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import prefers_batch_norm
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


def _may_mix(x: Tensor, value: Tensor) -> bool:
    """Whether torch's kernel takes both types."""
    return x.dtype == value.dtype or (x.dtype in (torch.float16, torch.bfloat16) and value.dtype == torch.float32)
