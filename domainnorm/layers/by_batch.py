"""Normalization batches in one call each way, where they are whole on this rank and made of nothing but the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..batches import Affine, Batches, normalize, read
from ..kernels import takes_batches
from ..moments import Moments
from .domains import DomainBatch

if TYPE_CHECKING:
    from .domain_batch_norm import DomainBatchNorm


def batches_of(layer: DomainBatchNorm, batch: DomainBatch) -> Batches | None:
    """The normalization batches of this input; None where rows must be merged in another way."""
    one, (width, first) = layer.num_domains == 1, layer.channels_together
    mixed = not all(isinstance(domain, int) for domain in batch.domains)
    if not width or batch.extra is not None or mixed or not takes_batches(batch.tensors):
        return None
    sizes = tuple(x.shape[0] for x in batch.tensors)
    lengths = tuple(math.prod(x.shape[2:]) for x in batch.tensors)
    groups: tuple[int, ...] = (0,) * len(sizes)
    number = 1
    if layer.split is not None:
        if not one or len(sizes) > 1:
            return None
        sizes = tuple(layer.split.sizes(sizes[0], batch.elements[0])) or (0,)
        groups, number, lengths = tuple(range(len(sizes))), len(sizes), lengths * len(sizes)
    elif layer.sgd_statistics == "per_domain":
        groups, number = tuple(map(int, batch.domains)), layer.num_domains  # none is mixed
    elif not one and layer.population_statistics == "per_domain":
        return None  # the moments of each domain are asked for, too
    return Batches.of(groups, sizes, lengths, number, width, layer.split is not None, first)


def normalize_by_batch(layer: DomainBatchNorm, batch: DomainBatch, batches: Batches) -> list[Tensor]:
    """Normalized by the moments of each of `batches`; updates the buffers."""
    if layer.training:
        layer._check_counts(batch, lambda: [count * batches.width for count in batches.counts], ranks=1)
    known = []

    def moments() -> tuple[Moments, Moments]:
        known.append(read(batch.tensors, batches))
        return batches.counted(known[0]), batches.of_rows(batches.moments(known[0]))

    def by_rows(xs: Sequence[Tensor], affine: Affine) -> list[Tensor]:
        rows, of = layer._read(list(xs))
        of = of.merge_by(torch.tensor(batches.group), len(batches.counts))
        return layer._normalize_by(rows, batches.of_rows(of), *affine)

    affine = layer._affine(batch, moments)
    outputs, tables = normalize(batch.tensors, batches, affine, layer.eps, by_rows, *known)
    if layer.training and batch.updates:
        of_channels = tables[0].shape[1] == layer.running_mean.shape[-1]
        layer._update_population(batches.counted(tables) if of_channels else batches.moments(tables))
    return outputs
