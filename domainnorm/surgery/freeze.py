"""BatchNorms of a model frozen in place."""

from collections.abc import Sequence

from torch import nn

from ..layers import DomainBatchNorm, FrozenBatchNorm
from .replace import replace_layers

_BatchNorm = nn.modules.batchnorm._BatchNorm


def freeze_batchnorm(model: nn.Module, prefixes: Sequence[str] = ("",), train_affine: bool = False) -> nn.Module:
    """Replace every BatchNorm of `model` by a `FrozenBatchNorm`, with the very same parameters.

    So an optimizer that holds them goes on with its state. Layers whose inference is more than an affine of each
    channel (SeqNorm, BGN, GBGN) stay what they are, with `frozen` set.

    Args:
        prefixes: of the names of the layers to replace; by default all.
        train_affine: whether their γ and β go on learning.

    Returns:
        The model, or the frozen layer in its place.
    """
    starts = tuple(prefixes)

    def freeze(name: str, module: nn.Module) -> nn.Module:
        if not isinstance(module, (DomainBatchNorm, _BatchNorm)) or getattr(module, "frozen", False):
            return module
        if not name.startswith(starts):
            return module
        frozen: nn.Module = module
        if isinstance(module, DomainBatchNorm) and not module.is_channel_affine:
            module.frozen = True
        else:
            frozen = FrozenBatchNorm.from_batch_norm(module, train_affine).train(module.training)
            frozen.weight, frozen.bias = module.weight, module.bias
        for parameter in frozen.parameters(recurse=False):
            parameter.requires_grad_(train_affine)
        return frozen

    return replace_layers(model, freeze)
