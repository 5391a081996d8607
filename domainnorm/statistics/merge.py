"""Population statistics merged over the ranks that gathered them."""

import torch
from torch import nn

from ..distributed import all_gather_stack, world_size
from ..layers import DomainBatchNorm
from ..ops.moments import Moments


@torch.no_grad()
def merge_population_statistics(model: nn.Module) -> nn.Module:
    """Merge the running statistics of every `DomainBatchNorm` over all ranks, in place. Every rank must call it.

    A layer that normalizes per rank, with or without shuffled inputs, has different running statistics on every rank.
    Merged, they are the moments of the union of what the ranks have seen (`Moments`), the same on all ranks. A rank is
    weighted by its EMA steps: one that never had an element does not count. `num_batches_tracked` becomes the largest
    of any rank. Layers that are frozen, or synchronized over all ranks, already agree and are left unchanged.

    Args:
        model: any module.

    Returns:
        The model.

    Example::

        >>> model = dn.merge_population_statistics(nn.Sequential(dn.DomainBatchNorm(16)))  # one rank: as it was
    """
    for layer in _kept_per_rank(model):
        population = layer.population
        assert population is not None
        mean, tracked = population.mean, population.num_batches_tracked
        before = mean.clone()
        for var in [population.var] if population.total_var is None else [population.var, population.total_var]:
            # (1 or K, 1) and (1 or K, C); float64, for sums that round to the same number if all ranks have it
            count, *own = (v.double().reshape(tracked.numel(), -1) for v in (tracked, before, var))
            merged = Moments(count, *own).merge_ranks(None)
            seen = merged.count > 0
            mean.copy_(torch.where(seen, merged.mean, own[0]).view_as(mean))
            var.copy_(torch.where(seen, merged.var, own[1]).view_as(var))
        tracked.copy_(all_gather_stack(tracked).amax(0))
    return model


def _kept_per_rank(model: nn.Module) -> list[DomainBatchNorm]:
    """The layers whose running statistics may differ between ranks."""
    if world_size() == 1:
        return []
    layers = (layer for layer in model.modules() if isinstance(layer, DomainBatchNorm))
    return [m for m in layers if m.sync is not True and not m.frozen and m.population is not None]
