"""What each call of each norm is given in a forward pass, and by which statistics it normalizes there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import DomainBatchNorm
from ..layers.inputs import LayerInput, Segmentation, spatial_elements
from ..ops.moments import Moments
from ..ops.partition import Partition
from .norms import Norm
from .padding import Padding

_SAMPLES, _PLACES = 16, 16  # how much of an input is kept, to be compared with that of another pass
Site = tuple[int, int, int]  # the number of a norm, of its call within a forward pass, and the domain


@dataclass
class Call:
    """One domain of the input of one call.

    Attributes:
        norm: the number of the layer.
        number: of the call, from 0, within the forward pass.
        domain: of these samples.
        rows: the moments `(S, C)` of the samples, in float64.
        batch: the moments `(1, C)` of all that training normalizes together with them.
        samples: how many that are, before the layer splits them into groups.
        elements: of a channel, all samples of the batch together.
        part: some elements `(n, C, p)` of the input, or None where channels are not what is normalized.
        unpadded: moments `(S, C)` of what is not padding; None: there is none.
        padded: the share of padding.
        dtype: of the input.
    """

    norm: int
    number: int
    domain: int
    rows: Moments
    batch: Moments
    samples: int
    elements: float
    part: Tensor | None
    unpadded: Moments | None
    padded: float
    dtype: torch.dtype

    @property
    def site(self) -> Site:
        return self.norm, self.number, self.domain


Choice = Callable[[Norm, int], Moments | None]  # of a layer and the number of its call; None: what it had


class Observer:
    """Records the calls of `norms`, and lets them normalize by other statistics, within `attached`.

    Args:
        norms: layers of one model, in eval mode.
    """

    def __init__(self, norms: Sequence[Norm]) -> None:
        self.norms = norms
        self.calls: list[Call] = []
        self.padding: Padding | None = None
        self._numbers = [0] * len(norms)
        self._minibatch: set[int] = set()
        self._choice: Choice | None = None

    def begin(self, padding: Padding | None = None) -> None:
        """Forget what was recorded: a forward pass begins."""
        self.calls, self.padding = [], padding
        self._numbers = [0] * len(self.norms)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """In this block all calls are recorded."""
        handles = []
        for k, norm in enumerate(self.norms):
            if isinstance(norm.module, DomainBatchNorm):
                norm.module.batch_hook = partial(self._see_ours, k)
            else:
                handles.append(norm.module.register_forward_pre_hook(partial(self._see, k), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for norm in self.norms:
                if isinstance(norm.module, DomainBatchNorm):
                    norm.module.batch_hook = None

    @contextmanager
    def by_minibatch(self, which: Sequence[int]) -> Iterator[None]:
        """In this block these norms, by their numbers, normalize by the moments of each input; no buffer changes."""
        ours = [layer for k in which if isinstance(layer := self.norms[k].module, DomainBatchNorm)]
        before = [module._statistics for module in ours]
        self._minibatch = set(which)
        for module in ours:
            module.statistics = "minibatch"
        try:
            yield
        finally:
            self._minibatch = set()
            for module, statistics in zip(ours, before, strict=True):
                module.statistics = statistics
            for k in which:
                if not self.norms[k].ours:
                    self._write(k, None)

    @contextmanager
    def by(self, choice: Choice) -> Iterator[None]:
        """In this block each call of a norm normalizes by the running statistics that `choice` has for it."""
        self._choice = choice
        try:
            yield
        finally:
            self._choice = None
            for k in range(len(self.norms)):
                self._write(k, None)

    def _write(self, k: int, moments: Moments | None) -> None:
        """The buffers of a layer; None: what they were."""
        norm = self.norms[k]
        mean, var = (norm.mean, norm.var) if moments is None else (moments.mean, moments.var)
        module: Any = norm.module
        with torch.no_grad():
            for buffer, value in ((module.running_mean, mean), (module.running_var, var)):
                buffer.copy_(value if buffer.ndim > 1 else value[0])

    def _see(self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or x.ndim < 2:
            return
        x = x.detach()
        number = self._next(k)
        rows = Moments.rows(x).double()
        batch = rows.merge(0)
        elements = rows.mean.shape[0] * math.prod(x.shape[2:])
        self._add(k, number, 0, rows, batch, x.shape[0], elements, x)
        if self._choice is not None:
            self._write(k, self._choice(self.norms[k], number))
        elif k in self._minibatch:
            several = elements > 1 and bool(batch.mean.isfinite().all() and batch.var.isfinite().all())
            self._write(k, batch if several else None)

    def _see_ours(self, k: int, layer: DomainBatchNorm, inputs: LayerInput) -> None:
        number = self._next(k)
        total = sum(x.shape[0] for x in inputs.tensors)
        each = Partition(total, [(s, 1) for s in range(total)])
        rows = layer.moments_of_domains(inputs, Segmentation([None] * len(inputs.tensors), each)).double()
        rows = Moments(rows.count.expand(total, 1), rows.mean, rows.var)
        ids = inputs.ids().to(rows.mean.device)
        per_sample = spatial_elements(inputs.tensors)
        elements = torch.cat(
            [torch.full((x.shape[0],), float(n)) for x, n in zip(inputs.tensors, per_sample, strict=True)]
        )
        shared = layer.sgd_statistics == "shared"
        whole = rows.merge(0)
        for domain in range(inputs.num_domains):
            of_domain = ids == domain
            own = rows[of_domain]
            together = torch.ones_like(of_domain) if shared else of_domain
            pairs = zip(inputs.tensors, inputs.domains, strict=True)
            only = [x for x, d in pairs if isinstance(d, int) and d == domain]
            is_plain = layer.is_channel_affine and not layer.channels_per_first_group
            x = only[0].detach() if len(only) == 1 and is_plain and rows.mean.shape[1] == only[0].shape[1] else None
            batch = whole if shared else own.merge(0)
            number_of = float(elements[together.cpu()].sum())
            if own.mean.shape[0] or inputs.num_domains == 1:
                self._add(k, number, domain, own, batch, int(together.sum()), number_of, x, inputs.tensors[0].dtype)
        if self._choice is not None:
            self._write(k, self._choice(self.norms[k], number))

    def _next(self, k: int) -> int:
        self._numbers[k] += 1
        return self._numbers[k] - 1

    def _add(
        self,
        k: int,
        number: int,
        domain: int,
        rows: Moments,
        batch: Moments,
        samples: int,
        elements: float,
        x: Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        part, unpadded, padded = None, None, 0.0
        if x is not None and x.numel():
            flat = x[:_SAMPLES].flatten(2) if x.ndim > 2 else x[:_SAMPLES, :, None]
            places = torch.linspace(0, flat.shape[2] - 1, min(_PLACES, flat.shape[2]), device=x.device).long()
            part = flat[:, :, places].double()
            if self.padding is not None:
                unpadded, padded = self.padding.moments(x)
        assert dtype is not None or x is not None
        kind = x.dtype if x is not None else dtype
        assert kind is not None
        self.calls.append(Call(k, number, domain, rows, batch, samples, elements, part, unpadded, padded, kind))
