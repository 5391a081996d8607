"""Which statistics normalize, in all layers of a model."""

from torch import nn

from ..layers import DomainBatchNorm


def set_statistics(model: nn.Module, statistics: str) -> nn.Module:
    """Choose which statistics normalize in every norm of this library in `model`; `FrozenBatchNorm` layers stay frozen.

    Args:
        model: any module.
        statistics: `"auto"`: minibatch in training, population in eval; `"minibatch"`: those of the current input, also
            in eval, where no buffer changes; `"population"`: the buffers, also in training.

    Returns:
        The model.

    Raises:
        TypeError: the model has a torch BatchNorm, whose statistics cannot be chosen; nothing was changed.
        ValueError: unknown statistics.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), dn.DomainBatchNorm(16)).eval()
        >>> dn.set_statistics(model, "minibatch")[1]
        DomainBatchNorm(16, affine='shared', eps=1e-05, momentum=0.1, statistics='minibatch')
    """
    refuse_torch_batch_norm(model)
    for module in model.modules():
        if isinstance(module, DomainBatchNorm):
            module.statistics = statistics
    return model


def refuse_torch_batch_norm(model: nn.Module) -> None:
    """Raises TypeError if the model has a torch BatchNorm, whose batch cannot be chosen."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, DomainBatchNorm):
            raise TypeError(
                f"{name or 'the model'} is torch's {type(module).__name__}, which follows train() and eval() only: "
                "dn.convert_batchnorm(model, 'DomainBatchNorm') makes it a layer whose statistics can be chosen"
            )
