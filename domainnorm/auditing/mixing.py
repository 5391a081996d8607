"""Several batches run side by side, whose layers normalize together what they are given of any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed.roi_shuffle import RoIShuffle
from ..errors import UserError
from ..layers import DomainBatchNorm
from ..layers.inputs import LayerInput, spatial_elements
from ..ops.moments import Moments, accumulate_dtype
from ..statistics.lockstep import OutOfStepError, barrier_exchange, run_lockstep
from .norms import Norm


class Rows(NamedTuple):
    """What one forward pass brings to a layer: moments `(S, C)`, and of each sample its domain and its group."""

    moments: Moments
    domains: Tensor
    groups: Tensor


class Mixing:
    """Normalizes samples of several batches together, within `attached`.

    All forward passes stop at each layer until all are there. Each sample then has a place in one of the normalization
    batches, its own, or that of any sample of the same domain. So the samples that a layer sees are exchanged, also
    RoIs of an image, while each prediction stays what it is of, and batches of any form and images of any size will do.

    Args:
        model: in eval mode, within `preserve_state`.
        norms: its layers. Those that training does not normalize by batches, or corrects, go on with their running
            statistics.
    """

    def __init__(self, model: nn.Module, norms: Sequence[Norm]) -> None:
        self.norms = norms
        follow = [k for k, norm in enumerate(norms) if self.follows(norm)]
        self.mixed = [k for k in follow if getattr(norms[k].module, "is_channel_affine", True)]
        self.alone = [k for k in follow if k not in self.mixed]  # groups of channels: normalized as the batch is
        shuffles = [module for module in model.modules() if isinstance(module, RoIShuffle)]
        inner = {module for shuffle in shuffles for module in shuffle.modules()}
        self.shuffled = {k for k, norm in enumerate(norms) if norm.module in inner}  # given at random, in training
        self._seed: int | None = None
        self._places: dict[Any, Tensor] = {}

    def follows(self, norm: Norm) -> bool:
        """Whether training normalizes it by its batches."""
        return norm.follows_batches and not norm.is_corrected

    @contextmanager
    def attached(self) -> Iterator[None]:
        """In this block layers normalize as `run` says, and what they had in their buffers is lost."""
        handles = []
        for k in [*self.mixed, *self.alone]:
            module: Any = self.norms[k].module
            if isinstance(module, DomainBatchNorm):
                module.statistics = "population" if k in self.mixed else "minibatch"
                module.example_weight = 0.0
                module.batch_hook = partial(self._normalize_ours, k) if k in self.mixed else None
            else:
                handles.append(module.register_forward_pre_hook(partial(self._normalize, k), with_kwargs=True))
            if k in self.mixed:  # their own part is γ and β alone
                module.running_mean.zero_()
                module.running_var.fill_(1 - self.norms[k].eps)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for k in self.mixed:
                if isinstance(module := self.norms[k].module, DomainBatchNorm):
                    module.batch_hook = None

    def run(self, forwards: Sequence[Callable[[], Any]], seed: int | None) -> list[Any]:
        """What the forward passes return.

        Args:
            forwards: one of each batch.
            seed: of the places that samples get at random; None: each batch is normalized as it is.

        Raises:
            UserError: the model runs its layers in another order for another batch.
        """
        self._seed, self._places = seed, {}
        try:
            return run_lockstep(forwards, self._combine)
        except OutOfStepError as error:
            raise UserError(f"leak and exact need a model that runs its layers in one order: {error}") from error

    def _combine(self, k: int, given: list[Rows]) -> list[tuple[Tensor, Tensor]]:
        """The mean and variance `(S, C)` that each sample of each forward pass is normalized by."""
        norm = self.norms[k]
        moments = Moments.cat([rows.moments for rows in given])
        if not moments.mean.shape[0]:
            return [(rows.moments.mean, rows.moments.var) for rows in given]
        domains = torch.cat([rows.domains for rows in given])
        sizes = [len(rows.domains) for rows in given]
        groups, total = [], 0
        for rows in given:
            groups.append(rows.groups + total)
            total += int(rows.groups.max()) + 1 if len(rows.groups) else 0
        own = torch.cat(groups)[self._placed(k, domains, sizes)]
        merged = moments.merge_by(own, total)
        several = (merged.count > 1).expand_as(merged.mean)[own]  # one element is normalized as in inference
        row = domains if norm.mean.shape[0] > 1 else torch.zeros_like(domains)
        mean = torch.where(several, merged.mean[own], norm.mean.to(own.device)[row])
        var = torch.where(several, merged.var[own], norm.var.to(own.device)[row])
        return list(zip(mean.split(sizes), var.split(sizes), strict=True))

    def _placed(self, k: int, domains: Tensor, sizes: Sequence[int]) -> Tensor:
        """The place `(S,)` of each sample: all layers with as many samples of a domain have the same."""
        placed = torch.arange(len(domains), device=domains.device)
        seed = 0 if self._seed is None and k in self.shuffled else self._seed
        if seed is None:
            return placed
        for domain in domains.unique().tolist():
            where = (domains == domain).nonzero()[:, 0]
            counts = tuple(int((own == domain).sum()) for own in domains.split(list(sizes)))
            if (key := (seed, counts)) not in self._places:
                generator = torch.Generator().manual_seed(seed + 1000 * len(self._places))
                self._places[key] = torch.randperm(len(where), generator=generator)
            placed[where] = where[self._places[key].to(where.device)]
        return placed

    def _normalize(
        self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or x.ndim < 2:
            return None
        zeros = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        (y,) = self._exchanged(k, [x], zeros, zeros)
        return ((y, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): y})

    def _normalize_ours(self, k: int, layer: DomainBatchNorm, inputs: LayerInput) -> None:
        ids = inputs.ids()
        shared = layer.sgd_statistics == "shared"
        groups = torch.zeros_like(ids) if shared else ids
        if layer.sample_groups is not None:
            partition = layer.sample_groups.segmentation(inputs, shared, spatial_elements(inputs.tensors), True).groups
            assert partition is not None
            numbers = torch.arange(partition.num_sets, device=ids.device)[:, None]
            groups = partition.spread(numbers).expand(len(ids), 1)[:, 0]
        inputs.tensors = self._exchanged(k, inputs.tensors, ids, groups)

    def _exchanged(self, k: int, tensors: Sequence[Tensor], domains: Tensor, groups: Tensor) -> list[Tensor]:
        """The tensors normalized, once the other forward passes are there."""
        parts = [Moments.rows(x) for x in tensors]
        counts = torch.cat([part.count.expand(part.mean.shape[0], 1) for part in parts])
        rows = Moments(counts, torch.cat([p.mean for p in parts]), torch.cat([p.var for p in parts])).double()
        mean, var = barrier_exchange(k, Rows(rows, domains, groups))
        sizes = [x.shape[0] for x in tensors]
        scale = (var + self.norms[k].eps).rsqrt()
        normalized = []
        for x, m, s in zip(tensors, mean.split(sizes), scale.split(sizes), strict=True):
            m, s = (v.to(accumulate_dtype(x)).view(*v.shape, *[1] * (x.ndim - 2)) for v in (m, s))
            normalized.append(((x - m) * s).to(x.dtype))
        return normalized
