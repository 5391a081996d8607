"""RoIs permuted over the ranks, and back (*Rethinking "Batch"*, §6.1, Fig. 9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from ..autograd import is_recomputed
from .collectives import Group, all_gather_stack, deepcopy_over_group, rank, world_size


class RoIShuffle(nn.Module):
    """A head, trained on RoIs that are randomly permuted over the ranks; its outputs come back in the order given.

    The RoIs of one image know much about each other. Where each GPU holds the RoIs of one or two images, a BatchNorm
    per GPU lets this leak through its statistics, and the head then fails under population statistics (*Rethinking
    "Batch"*, §6, Table 3). Shuffled, each rank normalizes a random share of all RoIs (Table 6).

    In training on W ranks with R RoIs in all, rank r computes those at `permutation[R·r/W : R·(r+1)/W]` of
    `roi_permutation(seed, step, R)`, by default sorted by the rank that brings them: the counts of two ranks
    differ by at most one, and any rank may bring none. One collective exchanges the counts; then one uneven all-to-all
    carries the features there and one each output back, in their own dtype, and the gradients take the reverse way. In
    eval, and with one rank, it is the wrapped module.

    Every rank must call it in the same steps, and use its output in the loss even when it brings no RoI; the outputs of
    the module must depend on its input also where that has no rows. Activation checkpointing belongs inside the
    wrapped module, not around the shuffle.

    Args:
        module: the head: features `(R, *)` in; out comes a tensor `(R, *)`, or a tuple, list or dict of them. Also
            any other callable, whose parameters then belong to another module.
        seed: of the permutations; equal on all ranks.
        group: the process group; None: all ranks.
        in_order: whether a rank's rows are in the order of the permutation, for layers that normalize groups of them:
            the rows of a group are then random ones, at the cost of a copy of the features each way.

    Attributes:
        step: the number of training forwards so far; in the state dict, so that a resumed run goes on with the next
            permutation.

    Shape:
        - Input: `(R, *)`
        - Output: as that of the module

    Example::

        >>> head = dn.RoIShuffle(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), dn.DomainBatchNorm(8)))
        >>> head(torch.randn(32, 4, 2, 2)).shape
        torch.Size([32, 8])
    """

    step: Tensor

    def __init__(
        self, module: Callable[[Tensor], Any], seed: int = 0, group: Group = None, in_order: bool = False
    ) -> None:
        super().__init__()
        self.module = module
        self.seed = seed
        self.group = group
        self.in_order = in_order
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Any:
        """Features `(R, *)` of this rank's RoIs -> what the module makes of them, in the same order.

        Raises:
            ValueError: the ranks are at different steps or have different seeds; or an output has not one row a RoI.
            RuntimeError: activation checkpointing runs it again, with what would be another permutation.
        """
        if not self.training:
            return self.module(x)
        if is_recomputed():
            raise RuntimeError("RoIShuffle cannot be recomputed: checkpoint the wrapped module, not the shuffle")
        self.step += 1
        if world_size(self.group) == 1:
            return self.module(x)
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # else this rank would miss the backward collectives of the others
        route = self._route(x)
        shuffled = _Exchange.apply(x, route, self.group)
        back = route.reversed()
        return _map(lambda y: _Exchange.apply(_one_row_a_roi(y, shuffled), back, self.group), self.module(shuffled))

    def _route(self, x: Tensor) -> Route:
        mine = torch.cat([x.new_tensor([len(x), self.seed], dtype=torch.long), self.step.to(x.device)[None]])
        counts, seeds, steps = all_gather_stack(mine, self.group).T.tolist()
        if len({*zip(seeds, steps, strict=True)}) > 1:
            raise ValueError(
                f"RoIShuffle: the ranks are at steps {steps} with seeds {seeds}; they must have one seed and make the "
                "same training forwards, from the same checkpoint"
            )
        permutation = roi_permutation(self.seed, steps[0] - 1, sum(counts))
        return Route.of(permutation, counts, rank(self.group), x.device, self.in_order)

    def __deepcopy__(self, memo: dict[int, Any]) -> RoIShuffle:
        return deepcopy_over_group(self, self.group, memo)

    def extra_repr(self) -> str:
        return f"seed={self.seed}"


def roi_permutation(seed: int, step: int, count: int) -> np.ndarray:
    """The permutation of `count` RoIs, rank after rank, in training forward `step` (from 0): int64, `(count,)`."""
    return np.random.default_rng([seed, step]).permutation(count)


@dataclass(frozen=True)
class Route:
    """The way of one rank's rows to other ranks: take them in this order, send, receive, put them in this order.

    Attributes:
        take: LongTensor, the row at each place of what is sent, rank after rank; None: as they are.
        sent, received: rows to and from each rank.
        put: LongTensor, the place in what was received of each row that results; None: as they come.
    """

    take: Tensor | None
    sent: list[int]
    received: list[int]
    put: Tensor | None = None

    @staticmethod
    def of(
        permutation: np.ndarray, counts: Sequence[int], rank: int, device: torch.device, in_order: bool = False
    ) -> Route:
        """From rows that are numbered through all ranks, `counts` on each, to an even split of `permutation`.

        Those a rank receives stay in the order in which they come, rank after rank, unless `in_order`: another order
        costs a copy of the features and as much again for their gradient.
        """
        ends = np.cumsum(counts)
        splits = len(permutation) * np.arange(len(counts) + 1) // len(counts)
        # As a sender: rows in the order of their places in the permutation, and so of the ranks that get them.
        places = np.argsort(permutation)[ends[rank] - counts[rank] : ends[rank]]
        to = np.searchsorted(splits[1:], places, side="right")
        mine = permutation[splits[rank] : splits[rank + 1]]
        source = np.searchsorted(ends, mine, side="right")
        # They come rank after rank and, of each, in the order of their places.
        put = torch.from_numpy(np.argsort(np.argsort(source, kind="stable"))).to(device) if in_order else None
        return Route(
            torch.from_numpy(np.argsort(places)).to(device),
            np.bincount(to, minlength=len(counts)).tolist(),
            np.bincount(source, minlength=len(counts)).tolist(),
            put,
        )

    def reversed(self) -> Route:
        """The way back."""
        take, put = (None if order is None else order.argsort() for order in (self.put, self.take))
        return Route(take, self.received, self.sent, put)


class _Exchange(Function):
    """Rows of all ranks to where a route takes them; the gradients take the way back."""

    @staticmethod
    def forward(ctx, x, route, group):
        ctx.route, ctx.group = route, group
        outgoing = x if route.take is None else x.index_select(0, route.take)
        incoming = x.new_empty((sum(route.received), *x.shape[1:]))
        # contiguous: what is channels_last would arrive in another order of elements
        dist.all_to_all_single(incoming, outgoing.contiguous(), route.received, route.sent, group=group)
        return incoming if route.put is None else incoming.index_select(0, route.put)

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.apply(grad, ctx.route.reversed(), ctx.group), None, None


def _one_row_a_roi(y: Any, x: Tensor) -> Tensor:
    if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(x):
        got = f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"{type(y).__name__}"
        raise ValueError(f"RoIShuffle: the module returns {got} for {len(x)} RoIs; it must return one row for each")
    if not len(x) and x.requires_grad and y.is_floating_point() and not y.requires_grad:
        raise ValueError(
            "RoIShuffle: given no RoIs, the module returns what does not depend on its input, and the other ranks "
            "would wait for its gradient: let it compute on the empty tensor"
        )
    return y


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_map(function, item) for item in value)
    return function(value)
