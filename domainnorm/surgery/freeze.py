"""BatchNorms of a model frozen in place."""

from collections.abc import Sequence

from torch import nn

from ..layers import DomainBatchNorm, FrozenBatchNorm
from ..statistics.preserve import unchanged_on_error
from .replace import check_affine, replace_layers

_BatchNorm = nn.modules.batchnorm._BatchNorm


@unchanged_on_error
def freeze_batchnorm(model: nn.Module, prefixes: Sequence[str] = ("",), train_affine: bool = False) -> nn.Module:
    """Replace every BatchNorm of `model` by a `FrozenBatchNorm` with the same parameters.

    The Parameters are the same objects, so an optimizer keeps its state. Layers whose inference is more than one affine
    per channel (SeqNorm, BGN, GBGN) keep their class, with `frozen` set (*Rethinking "Batch"*, §4.3).

    Args:
        model: any module; if it is a BatchNorm itself, it is left untouched.
        prefixes: name prefixes of the layers to replace; all by default.
        train_affine: whether γ and β continue to learn.

    Returns:
        The model, or the frozen layer in its place.

    Raises:
        ValueError: a layer keeps no running statistics, or its γ or β is pruned or parametrized; nothing was changed.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
        >>> type(dn.freeze_batchnorm(model)[1]).__name__
        'FrozenBatchNorm'
    """
    starts = tuple(prefixes)
    frozen: dict[nn.Module, nn.Module] = {}  # what takes the place of each
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or getattr(module, "frozen", False) or not name.startswith(starts):
            continue
        try:
            check_affine(module)
            stays = isinstance(module, DomainBatchNorm) and not module.is_channel_affine
            frozen[module] = module if stays else FrozenBatchNorm.from_batch_norm(module, train_affine)
        except ValueError as error:
            raise ValueError(f"{name or 'the model'}: {error}") from None
    for module, new in frozen.items():
        if isinstance(new, DomainBatchNorm) and new is module:
            new.frozen = True
        else:
            new.weight, new.bias = module.weight, module.bias
        for parameter in new.parameters(recurse=False):
            parameter.requires_grad_(train_affine)
    return replace_layers(model, lambda _, module: frozen.get(module, module))
