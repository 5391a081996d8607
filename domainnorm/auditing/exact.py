"""Moments of all batches, as if they were one."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops.moments import Moments
from ..statistics.preserve import preserve_state
from .mixing import Mixing, Rows
from .norms import Norm
from .observe import Site

if TYPE_CHECKING:
    from .run import Passes


class Together(Mixing):
    """Each layer normalizes the samples of all batches together (*Rethinking "Batch"*, App. A.3).

    Attributes:
        found: the moments `(1, C)` of each site.
    """

    def __init__(self, model: nn.Module, norms: Sequence[Norm]) -> None:
        super().__init__(model, norms)
        self.found: dict[Site, Moments] = {}
        self._calls: Counter[int] = Counter()

    def follows(self, norm: Norm) -> bool:
        return norm.follows_batches

    def _combine(self, k: int, given: list[Rows]) -> list[tuple[Tensor, Tensor]]:
        norm, call = self.norms[k], self._calls[k]
        self._calls[k] += 1
        moments = Moments.cat([rows.moments for rows in given])
        domains = torch.cat([rows.domains for rows in given])
        if not len(domains):
            return super()._combine(k, given)
        of_domains = moments.merge_by(domains, int(domains.max()) + 1)
        for domain in domains.unique().tolist():
            self.found[k, call, domain] = of_domains[domain : domain + 1]
        groups = torch.zeros_like(domains) if norm.shared_sgd else domains
        of_groups = moments.merge_by(groups, int(groups.max()) + 1)
        sizes = [len(rows.domains) for rows in given]
        return list(zip(of_groups.mean[groups].split(sizes), of_groups.var[groups].split(sizes), strict=True))


def exact_moments(passes: Passes, sources: Mapping[str, Sequence[Any]]) -> dict[Site, Moments]:
    """One pass over all batches side by side, within `preserve_state`, in training mode if there is a loss.

    Raises:
        UserError: the model runs its layers in another order for another batch.
    """
    together = Together(passes.model, passes.seen.norms)
    batches = [batch for own in sources.values() for batch in own]
    run = passes.predict if passes.loss is None else passes.score
    mode = contextlib.nullcontext() if passes.loss is None else passes.in_training_mode()
    with preserve_state(passes.model), together.attached(), mode:
        together.run([partial(run, batch) for batch in batches], None)
    passes.seen.passes += 1
    return _folded(together.found, passes.seen.own)


def _folded(found: Mapping[Site, Moments], seen: Iterable[Site]) -> dict[Site, Moments]:
    """Statistics of a model that takes the images of a batch one by one, as those of one forward pass of all."""
    calls: dict[int, int] = {}
    for k, call, _ in seen:
        calls[k] = max(calls.get(k, 0), call + 1)
    folded: dict[Site, Moments] = {}
    for (k, call, domain), moments in found.items():
        site = (k, call % calls.get(k, call + 1), domain)
        folded[site] = folded[site] + moments if site in folded else moments
    return folded
