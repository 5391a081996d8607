"""The dropout and activation that timm fuses into its norms, `act(drop(norm(x)))`."""

from typing import Any

from torch import nn

from .domain_batch_norm import DomainBatchNorm


def has_activation(layer: nn.Module) -> bool:
    """Whether it is one of timm's, or took over from one."""
    known = isinstance(layer, DomainBatchNorm) or type(layer).__module__.startswith("timm.")
    return known and set(layer._modules) == {"drop", "act"}


def keep_activation(new: nn.Module, layer: nn.Module) -> None:
    """Let `new`, which takes the place of `layer`, end with what is fused into that; the state-dict keys stay."""
    if has_activation(layer):
        for name, child in layer._modules.items():
            new.add_module(name, child)
        new.register_forward_hook(_activated)


def _activated(layer: Any, args: Any, output: Any) -> Any:
    if isinstance(output, list):
        return [layer.act(layer.drop(x)) for x in output]
    return layer.act(layer.drop(output))
