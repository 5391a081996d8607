"""Normalization batches in one call each way, where they are whole on this rank and made of nothing but the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..batches import Affine, batch_moments, corrected, counted, normalize, of_rows
from ..kernels import takes_batches
from ..kernels.compiled_batches import Batches, Tables
from .domains import DomainBatch

if TYPE_CHECKING:
    from .domain_batch_norm import DomainBatchNorm


def groups_of(layer: DomainBatchNorm, batch: DomainBatch) -> tuple[tuple[int, ...], int] | None:
    """Of each tensor the group that its samples are normalized with, and the number of groups.

    None: a tensor has samples of several domains, there are moments from elsewhere, or those of each domain are asked
    for though all are normalized together.
    """
    one = layer.num_domains == 1
    domains = [domain for domain in batch.domains if isinstance(domain, int)]
    if batch.extra is not None or len(domains) < len(batch.domains):
        return None
    if not one and layer.sgd_statistics == "per_domain":
        return tuple(domains), layer.num_domains
    return ((0,) * len(domains), 1) if one or layer.population_statistics == "shared" else None


def batches_of(layer: DomainBatchNorm, batch: DomainBatch) -> Batches | None:
    """The normalization batches of this input; None where rows must be merged in another way."""
    width, first = layer.channels_together
    found = groups_of(layer, batch)
    if found is None or not width or not takes_batches(batch.tensors):
        return None
    groups, number = found
    shapes: tuple[tuple[int, ...], ...] = tuple([x.shape for x in batch.tensors])
    if layer.split is not None:
        if layer.num_domains > 1 or len(shapes) > 1:
            return None
        ((samples, *row),) = shapes
        sizes = layer.split.sizes(samples, batch.elements[0]) or [0]
        shapes = tuple([(size, *row) for size in sizes])
        groups, number = tuple(range(len(sizes))), len(sizes)
    return Batches.of(groups, shapes, number, width, layer.split is not None, first)


def normalize_by_batch(layer: DomainBatchNorm, batch: DomainBatch, batches: Batches) -> list[Tensor]:
    """Normalized by the moments of each of `batches`; updates the buffers."""
    few = layer.split is not None and len(batch.tensors[0]) < layer.split.least
    if layer.training and (few or (1 in batches.counts and batches.width == 1)):
        layer._check_counts(batch, lambda: [count * batches.width for count in batches.counts], ranks=1)
    towards = layer._towards(batch, batches)

    def by_rows(xs: Sequence[Tensor], affine: Affine, tables: Tables) -> list[Tensor]:
        rows, of = layer._read(list(xs))
        of = of_rows(batches, of.merge_by(batches.ids, len(batches.counts)))
        if tables.corrections is not None:
            affine = corrected(affine, *(of_rows(batches, v) for v in tables.corrections))
        return layer._normalize_by(rows, of, *affine)

    outputs, tables = normalize(batch.tensors, batches, layer._affine(batch), layer.eps, by_rows, towards)
    if layer.training and batch.updates:
        if towards is not None:
            layer._remember(tables.counted[0])
        of_channels = tables.counted.shape[-1] == layer.running_mean.shape[-1]
        layer._update_known(*(counted if of_channels else batch_moments)(batches, tables))
    return outputs
