"""BatchNorm whose statistics, and by default affine, are constants."""

from typing import Any

import torch
from torch import nn

from .domain_batch_norm import DomainBatchNorm


class FrozenBatchNorm(DomainBatchNorm):
    """`weight · (x - running_mean) / sqrt(running_var + eps) + bias`, in training and in inference alike.

    FrozenBN of *Rethinking "Batch"* (§4.2): the statistics are constants, `train()` and `dn.set_statistics` do not
    thaw it, and γ, β learn only with `train_affine=True`. State dict as `nn.BatchNorm2d`. With several domains, the
    statistics and the affine of each are chosen as in `DomainBatchNorm`.

    Args:
        num_features: C.
        train_affine: whether γ and β require a gradient.
        **options: of `DomainBatchNorm`.
    """

    def __init__(self, num_features: int, train_affine: bool = False, **options: Any) -> None:
        super().__init__(num_features, **options)
        for parameter in self.parameters():
            parameter.requires_grad_(train_affine)

    @property
    def statistics(self) -> str:
        return "population"

    @statistics.setter
    def statistics(self, value: str) -> None:
        """Whatever is asked for, frozen statistics stay what they are."""

    @classmethod
    def from_domain_batch_norm(cls, layer: DomainBatchNorm) -> "FrozenBatchNorm":
        """A frozen copy of `layer`: its buffers and affine, in new tensors."""
        frozen = cls(
            layer.num_features,
            num_domains=layer.num_domains,
            population_statistics=layer.population_statistics,
            affine=layer.affine,
            eps=layer.eps,
            device=layer.running_mean.device,
            dtype=layer.running_mean.dtype,
        )
        with torch.no_grad():
            frozen.load_state_dict(layer.state_dict())
        return frozen


def freeze_batchnorm(model: nn.Module) -> nn.Module:
    """Replace every `DomainBatchNorm` inside `model` by its frozen copy; returns the model (or the copy itself)."""
    if isinstance(model, DomainBatchNorm) and not isinstance(model, FrozenBatchNorm):
        return FrozenBatchNorm.from_domain_batch_norm(model)
    for name, child in model.named_children():
        model.add_module(name, freeze_batchnorm(child))
    return model
