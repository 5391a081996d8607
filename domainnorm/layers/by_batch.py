"""Normalization batches in one call each way, where they are whole on this rank and made of nothing but the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..batches import Affine, Batches, normalize, read
from ..kernels import takes_batches
from ..kernels.compiled_batches import Tables
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
    sizes, lengths = [len(x) for x in batch.tensors], [math.prod(x.shape[2:]) for x in batch.tensors]
    if layer.split is not None:
        if not one or len(sizes) > 1:
            return None
        sizes = layer.split.sizes(sizes[0], batch.elements[0]) or [0]
        groups, number, lengths = range(len(sizes)), len(sizes), lengths * len(sizes)
    elif one or layer.sgd_statistics == "shared":
        if not one and layer.population_statistics == "per_domain":
            return None  # the moments of each domain are asked for, too
        groups, number = [0] * len(sizes), 1
    else:
        groups, number = [int(domain) for domain in batch.domains], layer.num_domains
    counts = [0] * number
    for group, size, length in zip(groups, sizes, lengths, strict=True):
        counts[group] += size * length
    dtype = torch.float64 if batch.tensors[0].dtype == torch.float64 else torch.float32
    of_sample = None if number == 1 else torch.tensor(groups).repeat_interleave(torch.tensor(sizes))
    return Batches(of_sample, torch.tensor(counts, dtype=dtype).unsqueeze(1), width, first)


def normalize_by_batch(layer: DomainBatchNorm, batch: DomainBatch, batches: Batches) -> list[Tensor]:
    """Normalized by the moments of each of `batches`; updates the buffers."""
    if layer.training:
        layer._check_counts(batch, batches.batch_counts, ranks=1)
    known = []

    def counted(tables: Tables) -> Moments:
        of = batches.counted(tables, layer.running_mean.shape[-1])
        return of if layer.split is None else of.merge(0)

    def moments() -> tuple[Moments, Moments]:
        known.append(read(batch.tensors, batches))
        return counted(known[0]), batches.of_rows(batches.counted(known[0], layer.num_features))

    def by_rows(xs: Sequence[Tensor], affine: Affine) -> list[Tensor]:
        rows, of = layer._read(list(xs))
        of = of.merge(0) if batches.group is None else of.merge_by(batches.group, batches.groups)
        return layer._normalize_by(rows, batches.of_rows(of), *affine)

    affine = layer._affine(batch, moments)
    outputs, tables = normalize(batch.tensors, batches, affine, layer.eps, by_rows, *known)
    if layer.training and batch.updates:
        layer._update_population(counted(tables))
    return outputs
