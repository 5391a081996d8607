"""Extra samples that take part in the statistics and in nothing else (*Rethinking "Batch"*, App. A.5)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..autograd import is_recomputed
from ..layers import DomainBatchNorm
from ..layers.inputs import LayerInput
from ..ops.moments import Moments
from .choose import refuse_torch_batch_norm
from .lockstep import barrier_exchange, run_lockstep

RECOMPUTED = "virtual batches do not work with activation checkpointing: the extra images are gone"


@contextmanager
def virtual_batch(model: nn.Module, extra_images: Any, *more: Any) -> Iterator[None]:
    """Context manager in which `model(x)` normalizes by the minibatch statistics of `x` and `extra_images` together.

    Both go through the model in step. No gradient flows through the extra images, and their outputs are not returned;
    in training they count in the running statistics. In eval, layers use minibatch statistics inside the block, and no
    buffer changes. Frozen layers, and layers under population statistics, stay so.

    Args:
        model: with `DomainBatchNorm` layers. `model(extra_images, *more)` runs along with each call in the block.
        extra_images: images as the model takes them.
        *more: further arguments of that call, such as targets.

    Returns:
        A context manager.

    Raises:
        TypeError: the model has a torch BatchNorm.
        ValueError: no layer of the model normalizes by minibatches, a layer splits them into groups, or the blocks are
            nested.
        RuntimeError: activation checkpointing recomputes the model inside the block; turn it off.
        OutOfStepError: from the call, if the model runs its layers in a different order for the extra images.

    Example::

        >>> model, x, extra = nn.Sequential(dn.DomainBatchNorm(16)), torch.randn(1, 16, 8, 8), torch.randn(7, 16, 8, 8)
        >>> with dn.virtual_batch(model, extra):
        ...     y = model(x)
        >>> torch.allclose(y, dn.DomainBatchNorm(16)(torch.cat([x, extra]))[:1], atol=1e-5)
        True
    """
    refuse_torch_batch_norm(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DomainBatchNorm) and m.statistics != "population"}
    if not layers:
        raise ValueError("the model has no DomainBatchNorm that normalizes by minibatches")
    if hooked := [name for name, layer in layers.items() if layer.batch_hook is not None]:
        raise ValueError(f"{hooked[0]} has a batch_hook already: virtual batches cannot be nested")
    if split := [name for name, layer in layers.items() if layer.sample_groups is not None]:
        raise ValueError(
            f"{split[0]} ({type(layers[split[0]]).__name__}) normalizes groups of samples apart, which a virtual batch "
            "would not make larger: give it larger groups"
        )
    own_forward = vars(model).get("forward")  # of this object, not of its class
    choices = [layer.statistics for layer in layers.values()]
    try:
        model.forward = WithExtra(model.forward, (extra_images, *more))
        for name, layer in layers.items():
            layer.statistics = "minibatch"
            layer.batch_hook = partial(_join, name)
        yield
    finally:
        del model.forward
        if own_forward is not None:
            model.forward = own_forward
        for layer, choice in zip(layers.values(), choices, strict=True):
            layer.statistics, layer.batch_hook = choice, None


class WithExtra:
    """The forward of a model, run in step with one of extra samples.

    Attributes:
        alone: the forward without them.
    """

    def __init__(self, alone: Callable[..., Any], extra: tuple[Any, ...]) -> None:
        self.alone = alone
        self.extra = extra

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_recomputed():
            raise RuntimeError(RECOMPUTED)
        extra = partial(_without_gradient, self.alone, *self.extra)
        return run_lockstep([extra, partial(self.alone, *args, **kwargs)], _exchange)[1]


@torch.no_grad()
def _without_gradient(forward: Callable[..., Any], *args: Any) -> None:
    forward(*args)


def _join(name: str, layer: DomainBatchNorm, inputs: LayerInput) -> None:
    """The moments of the other forward at this layer join the normalization batch, as constants."""
    if not inputs.updates:
        raise RuntimeError(RECOMPUTED)
    own = layer.moments_of_domains(inputs).detach()
    *other, inputs.updates = barrier_exchange(name, (own.count, own.mean, own.var))
    inputs.external = Moments(*other)


def _exchange(_: str, values: list[Any]) -> list[Any]:
    extra, own = values
    return [(*own, False), (*extra, True)]
