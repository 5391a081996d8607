"""Layers at equal depth of parallel branches, normalized with one collective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..distributed import Group, world_size
from ..moments import Moments
from .by_batch import batches_of, normalize_by_batch
from .by_operator import normalize_by_operator, suits_operator
from .by_torch import normalize_by_torch, suits_torch
from .domains import DomainBatch, Domains, Input

if TYPE_CHECKING:
    from .domain_batch_norm import DomainBatchNorm


def normalize_in_step(
    layers: Sequence[DomainBatchNorm], inputs: Sequence[Input], domain: Domains | None = None
) -> list[Input]:
    """`[layer(x, domain) for layer, x in zip(layers, inputs)]` with one collective for all layers.

    For layers at the same depth of parallel branches, such as the two towers of RetinaNet's head: their inputs have
    equal `N` and spatial sizes, and the layers the same `num_domains`, `sync` and `statistics`.
    """
    batches = [layer._batch(x, domain) for layer, x in zip(layers, inputs, strict=True)]
    group, ranks = _ranks(layers[0])
    if ranks > 1:
        outputs = _merged(layers, batches, group, ranks)
    else:
        outputs = [_alone(layer, batch) for layer, batch in zip(layers, batches, strict=True)]
    return [out if isinstance(x, (list, tuple)) else out[0] for x, out in zip(inputs, outputs, strict=True)]


def normalize(layer: DomainBatchNorm, batch: DomainBatch) -> list[Tensor]:
    """The input of one layer."""
    group, ranks = _ranks(layer)
    return _merged([layer], [batch], group, ranks)[0] if ranks > 1 else _alone(layer, batch)


def _ranks(layer: DomainBatchNorm) -> tuple[Group, int]:
    """The process group over which this forward merges moments, and its size."""
    if not layer.sync or not layer.training or not layer.uses_minibatch:
        return None, 1
    group = None if isinstance(layer.sync, bool) else layer.sync
    return group, world_size(group)


def _alone(layer: DomainBatchNorm, batch: DomainBatch) -> list[Tensor]:
    """On this rank, in the fastest way that there is."""
    if not layer.uses_minibatch:
        return layer._population(batch)
    if torch.compiler.is_compiling():
        if suits_operator(layer, batch):
            return normalize_by_operator(layer, batch)
    elif suits_torch(layer, batch):
        return normalize_by_torch(layer, batch)
    elif (whole := batches_of(layer, batch)) is not None:
        return normalize_by_batch(layer, batch, whole)
    return _merged([layer], [batch], None, 1)[0]


def _merged(
    layers: Sequence[DomainBatchNorm], batches: Sequence[DomainBatch], group: Group, ranks: int
) -> list[list[Tensor]]:
    """Normalized by the merged moments of each normalization batch."""
    first = layers[0]
    local = [layer._merge(batch) for layer, batch in zip(layers, batches, strict=True)]
    if ranks > 1:
        _check_in_step(batches)
        widths = [of.mean.shape[1] for of in local]
        means, variances = (torch.cat([getattr(m, name) for m in local], dim=1) for name in ("mean", "var"))
        merged = Moments(local[0].count, means, variances).merge_ranks(group)
        halves = zip(merged.mean.split(widths, 1), merged.var.split(widths, 1), strict=True)
        local = [Moments(merged.count, mean, var) for mean, var in halves]
    if first.training:
        first._check_counts(batches[0], lambda: local[0].count.flatten().tolist(), ranks)
    return [layer._normalize(b, m) for layer, b, m in zip(layers, batches, local, strict=True)]


def _check_in_step(batches: Sequence[DomainBatch]) -> None:
    """One collective carries one count per domain for all layers."""
    shapes = [[(x.shape[0], *x.shape[2:]) for x in batch.tensors] for batch in batches]
    for other in shapes[1:]:
        if other != shapes[0]:
            raise ValueError(f"layers in step take inputs of equal N and spatial sizes, got {shapes[0]} and {other}")
