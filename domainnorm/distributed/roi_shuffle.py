"""RoIs permuted over the ranks, and back (*Rethinking "Batch"*, §6.1, Fig. 9)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from ..autograd import is_recomputed
from .collectives import Group, all_gather_stack, deepcopy_over_group, gather_objects, rank, world_size


class RoIShuffle(nn.Module):
    """Wrap a head so that it trains on RoIs randomly permuted over the ranks; outputs come back in the original order.

    The RoIs of one image are correlated. If each GPU holds the RoIs of one or two images, per-GPU BatchNorm leaks this
    information through its statistics, and the head then fails under population statistics (*Rethinking "Batch"*, §6,
    Table 3). After shuffling, each rank normalizes a random share of all RoIs (Table 6).

    In training on W ranks with R RoIs in total, rank r computes the RoIs at `permutation[R·r/W : R·(r+1)/W]` of
    `roi_permutation(seed, step, R)`, by default sorted by the rank they come from. The counts of two ranks differ by at
    most one, and any rank may contribute none. One uneven all-to-all carries the features there and one per output
    carries it back, in their own dtype; gradients take the reverse way. In eval, and with one rank, it is the wrapped
    module.

    Every rank must call it in the same steps, and use one of its outputs in the loss even if it contributes no RoI.
    Before rows are sent, each way, one small collective compares the ranks' steps and what they send; if they disagree,
    all of them raise. Activation checkpointing belongs inside the wrapped module, not around the shuffle.

    Args:
        module: the head. It takes features `(R, *)` and returns a tensor `(R, *)`, or a tuple, list, dict or dataclass
            of such tensors and of values without rows: numbers, strings, None. It may be any callable, whose parameters
            then belong to another module.
        seed: of the permutations; equal on all ranks.
        group: the process group; None: all ranks.
        in_order: whether a rank's rows are in the order of the permutation, for layers that normalize groups of rows:
            the rows of a group are then random, at the cost of a copy of the features each way.

    Attributes:
        step: the number of training forward passes so far; kept in the state dict, so that a resumed run continues with
            the next permutation.

    Shape:
        - Input: `(R, *)`
        - Output: same as the module's

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
        """Apply the module to the features `(R, *)` of this rank's RoIs; outputs are in the same order.

        Raises:
            ValueError: the ranks are at different steps, have different seeds, or pass features or outputs of different
                kinds; an output does not have one row per RoI; or the module raised on another rank.
            RuntimeError: activation checkpointing recomputes it, which would use another permutation.
        """
        if not self.training:
            return self.module(x)
        if is_recomputed():
            raise RuntimeError("RoIShuffle cannot be recomputed: checkpoint the wrapped module, not the shuffle")
        self.step += 1
        if world_size(self.group) == 1:
            return self.module(x)
        with_gradient = torch.is_grad_enabled()
        if with_gradient and not x.requires_grad:
            x = x.detach().requires_grad_()  # else this rank would miss the backward collectives of the others
        here = _Place(self.seed, self.step, self.group, x.device)
        counts = here.compare("its forward pass", f"{_kind(x)}{'' if with_gradient else ', without gradients'}", len(x))
        permutation = roi_permutation(self.seed, here.step - 1, sum(counts))
        route = Route.of(permutation, counts, rank(self.group), x.device, self.in_order)
        shuffled = _Exchange.apply(x, route, here)
        outputs: list[Tensor] = []
        failure, said = None, ""
        try:
            value = self.module(shuffled)
            _map(outputs.append, value)
            for y in outputs:
                _check_rows(y, shuffled)
            said = ", ".join(map(_kind, outputs))
        except Exception as error:  # the other ranks learn it, and do not wait for this one
            failure, said = error, f"{type(error).__name__} ({error})"
        here.compare("the outputs", said, failure=failure)
        returned = iter(_Return.apply(route.reversed(), here, shuffled, *outputs))
        return _map(lambda _: next(returned), value)

    def __deepcopy__(self, memo: dict[int, Any]) -> RoIShuffle:
        return deepcopy_over_group(self, self.group, memo)

    def extra_repr(self) -> str:
        return f"seed={self.seed}"


def roi_permutation(seed: int, step: int, count: int) -> np.ndarray:
    """The permutation of `count` RoIs, numbered rank after rank, in training step `step` ≥ 0: int64, `(count,)`."""
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


class _Place:
    """Where a rank is in one training forward of a shuffle, and its backward pass."""

    def __init__(self, seed: int, step: Tensor, group: Group, device: torch.device) -> None:
        self.seed = seed
        self.step: Any = step  # a number once the ranks have been compared: a GPU is waited for then
        self.group = group
        self.device = device

    def compare(self, phase: str, kind: str, count: int = 0, failure: Exception | None = None) -> list[int]:
        """The counts of all ranks.

        Raises:
            ValueError: on every rank, if not all are in this phase of this step, with the same seed and kind.
            Exception: `failure` itself, which has one of another kind.
        """
        words = [crc32(phase.encode()), 0, self.seed, crc32(kind.encode()), count]
        mine = torch.tensor(words, dtype=torch.long, device=self.device)
        mine[1] = self.step
        ranks = all_gather_stack(mine, self.group).tolist()
        self.step = ranks[rank(self.group)][1]
        if all(other[:4] == ranks[0][:4] for other in ranks) and failure is None:
            return [other[4] for other in ranks]
        told = gather_objects((phase, kind), self.group)
        if failure is not None:
            raise failure
        steps, seeds = ([other[k] for other in ranks] for k in (1, 2))
        if len({*zip(steps, seeds, strict=True)}) > 1:
            reason = (
                f"the ranks are at steps {steps} with seeds {seeds}; they must have one seed and make the same "
                "training forwards, from the same checkpoint"
            )
        else:
            reason = "the ranks differ; they must call it alike, and use its outputs in the loss alike"
        places = "; ".join(f"rank {r}: {count} {what}" for r, (count, what) in enumerate(told))
        raise ValueError(f"RoIShuffle: {reason} ({places})")


class _Exchange(Function):
    """Rows of all ranks to where a route takes them; the gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route, here: _Place) -> Tensor:
        ctx.route, ctx.here = route, here
        outgoing = x if route.take is None else x.index_select(0, route.take)
        incoming = x.new_empty((sum(route.received), *x.shape[1:]))
        # contiguous: what is channels_last would arrive in another order of elements
        dist.all_to_all_single(incoming, outgoing.contiguous(), route.received, route.sent, group=here.group)
        return incoming if route.put is None else incoming.index_select(0, route.put)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.here.compare("the gradient of its features", _kind(grad))
        return _Exchange.apply(grad, ctx.route.reversed(), ctx.here), None, None


class _Return(Function):
    """All outputs by a route, at once: the gradients of all go back if any of them is used, or the features are."""

    @staticmethod
    def forward(ctx: Any, route: Route, here: _Place, shuffled: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.route, ctx.here = route, here
        returned = tuple(_Exchange.apply(y, route, here) for y in outputs)
        ctx.is_differentiable = [y.is_floating_point() or y.is_complex() for y in outputs]
        pairs = zip(returned, ctx.is_differentiable, strict=True)
        ctx.mark_non_differentiable(*(y for y, differentiable in pairs if not differentiable))
        return returned

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        back = ctx.route.reversed()
        own = [grad if yes else None for grad, yes in zip(grads, ctx.is_differentiable, strict=True)]
        ctx.here.compare("the gradients of its outputs", ", ".join(_kind(grad) for grad in own if grad is not None))
        found = (None if grad is None else _Exchange.apply(grad, back, ctx.here) for grad in own)
        return None, None, None, *found  # the third: also where no output depends on it, its node takes part


def _kind(x: Tensor) -> str:
    """What must be equal on all ranks: the dtype and the shape of a row."""
    return f"{str(x.dtype).removeprefix('torch.')} (*, {', '.join(map(str, x.shape[1:]))})"


def _check_rows(y: Tensor, x: Tensor) -> None:
    if y.ndim == 0 or len(y) != len(x):
        raise ValueError(
            f"RoIShuffle: the module returns a tensor of shape {tuple(y.shape)} for {len(x)} RoIs; it must return one "
            "row for each"
        )


def _map(function: Callable[[Tensor], Any], value: Any) -> Any:
    """What a module returns, with `function` of each tensor in the place of it."""
    if isinstance(value, Tensor):
        return function(value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return value
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_map(function, item) for item in value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map(function, item) for item in value)
    if isinstance(value, MutableMapping):
        twin = copy.copy(value)
        for key, item in value.items():
            twin[key] = _map(function, item)
        return twin
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        other = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(other, field.name, _map(function, getattr(value, field.name)))
        return other
    raise ValueError(
        f"RoIShuffle: the module returns a {type(value).__name__}; it must return tensors with one row for each RoI, "
        "or tuples, lists, dicts and dataclasses of them"
    )
