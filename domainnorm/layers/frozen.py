"""BatchNorm whose statistics, and by default affine, are constants."""

from typing import Any

import torch
from torch import nn

from .activation import keep_activation
from .domain_batch_norm import DomainBatchNorm

_BatchNorm = nn.modules.batchnorm._BatchNorm


class FrozenBatchNorm(DomainBatchNorm):
    """`weight · (x - running_mean) / sqrt(running_var + eps) + bias`, in training and in inference alike.

    This is FrozenBN of *Rethinking "Batch"* (§4.3): the statistics are constants, which neither `train()` nor
    `dn.set_statistics` unfreezes; γ and β learn only with `train_affine=True`. The state dict is that of
    `nn.BatchNorm2d`. With several domains, the statistics and the affine of each domain are selected as in
    `DomainBatchNorm`.

    Args:
        num_features: number of channels, C.
        train_affine: whether γ and β require gradients.
        **options: of `DomainBatchNorm`.

    Shape:
        - Input: `(N, C, *)`, or a list of such tensors
        - Output: same as the input

    Raises:
        ValueError: `track_running_stats=False`: there would be no statistics to freeze.

    Example::

        >>> frozen = dn.FrozenBatchNorm.from_batch_norm(nn.BatchNorm2d(16))
        >>> x = torch.randn(4, 16, 8, 8)
        >>> torch.equal(frozen.train()(x), frozen.eval()(x))
        True
    """

    def __init__(self, num_features: int, *, train_affine: bool = False, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.frozen = True
        for parameter in self.parameters():
            parameter.requires_grad_(train_affine)

    @classmethod
    def from_batch_norm(cls, layer: DomainBatchNorm | _BatchNorm, train_affine: bool = False) -> "FrozenBatchNorm":
        """Create a frozen copy of any BatchNorm, also torch's, with its statistics and affine in new tensors.

        Args:
            layer: the layer to copy; it is not changed.
            train_affine: whether γ and β of the copy require gradients.

        Returns:
            The frozen layer.

        Raises:
            ValueError: the layer keeps no running statistics, or its inference is not a single affine per channel.
        """
        if isinstance(layer, DomainBatchNorm) and not layer.is_channel_affine:
            raise ValueError(f"{type(layer).__name__} is no affine of each channel in inference: use freeze_batchnorm")
        if layer.running_mean is None:
            raise ValueError(f"{layer} keeps no running statistics (track_running_stats=False) that could be frozen")
        factory: dict[str, Any] = {"device": layer.running_mean.device, "dtype": layer.running_mean.dtype}
        if isinstance(layer, DomainBatchNorm):
            names = ("num_domains", "sgd_statistics", "population_statistics", "affine", "momentum")
            factory |= {name: getattr(layer, name) for name in names}
        else:
            factory |= {"affine": "shared" if layer.affine else None, "momentum": layer.momentum}
        factory["bias"] = layer.bias is not None or layer.weight is None
        frozen = cls(layer.num_features, train_affine=train_affine, eps=layer.eps, **factory)
        if isinstance(layer, DomainBatchNorm):
            frozen.copy_domain_config(layer)
        with torch.no_grad():
            frozen.load_state_dict({key: value for key, value in layer.state_dict().items() if "." not in key})
        if isinstance(layer, DomainBatchNorm):
            frozen.example_weight = layer.example_weight
        keep_activation(frozen, layer)
        return frozen

    def to_batch_norm(self, kind: type[nn.Module] = DomainBatchNorm) -> nn.Module:
        """Create a trainable copy, with the statistics and the affine in new tensors.

        Args:
            kind: `DomainBatchNorm` or, with one domain, a BatchNorm class of torch.

        Returns:
            A layer of class `kind`.

        Raises:
            ValueError: there are several domains, and `kind` is torch's.
        """
        options: dict[str, Any] = {"eps": self.eps, "momentum": self.momentum}
        assert self.running_mean is not None  # as it is frozen
        options |= {"device": self.running_mean.device, "dtype": self.running_mean.dtype}
        if issubclass(kind, DomainBatchNorm):
            names = ("num_domains", "sgd_statistics", "population_statistics", "affine")
            options |= {name: getattr(self, name) for name in names}
        elif self.num_domains > 1:
            raise ValueError(f"{kind.__name__} has one domain, this layer {self.num_domains}: thaw to DomainBatchNorm")
        else:
            options["affine"] = self.affine is not None
        if self.weight is not None and self.bias is None:
            options["bias"] = False  # torch's layers take it from 2.15 on
        thawed = kind(self.num_features, **options)
        if isinstance(thawed, DomainBatchNorm):
            thawed.copy_domain_config(self)
        with torch.no_grad():
            thawed.load_state_dict({key: value for key, value in self.state_dict().items() if "." not in key})
        keep_activation(thawed, self)
        return thawed
