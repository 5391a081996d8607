"""Norms folded into the convolutions before them, for deployment."""

import copy
from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from .layers import DomainBatchNorm

_BatchNorm = nn.modules.batchnorm._BatchNorm
_FUSED_BY: dict[type[nn.Module], Any] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), fuse_conv_bn_eval),
    nn.Linear: fuse_linear_bn_eval,
}


def fuse(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference, whose convolutions and linear layers contain the BatchNorms right after them.

    By torch's own fusion. What follows what is found by tracing (`torch.fx`) the model or, where its control flow
    cannot be traced, its parts. Left as they are: norms that follow something else, layers used several times, and
    statistics per domain, for which one convolution cannot stand.

    Raises:
        ValueError: a norm is in training mode or under minibatch statistics, which no convolution has. Fuse after
            training, not before fine-tuning: a fused affine is another optimization problem (*Rethinking "Batch"*,
            App. A.8).
    """
    for name, module in model.named_modules():
        if not isinstance(module, (DomainBatchNorm, _BatchNorm)):
            continue
        if module.training:
            raise ValueError(
                f"{name or 'the model'} is in training mode: call eval() first, and fuse after training only, because "
                "a fused model is optimized differently"
            )
        if isinstance(module, DomainBatchNorm) and module.uses_minibatch:
            raise ValueError(f"{name or 'the model'} uses minibatch statistics, which cannot be fused")
    fused = copy.deepcopy(model)
    uses: dict[nn.Module, int] = {}
    pairs = list(_pairs(fused, uses))
    for parent, conv_name, norm_name in pairs:
        conv, norm = parent.get_submodule(conv_name), parent.get_submodule(norm_name)
        if uses[conv] == uses[norm] == 1 and norm.running_mean is not None and norm.running_mean.ndim == 1:
            weight = getattr(norm, "weight", None)
            if weight is None or weight.ndim == 1:
                parent.set_submodule(conv_name, _FUSED_BY[type(conv)](conv, norm))
                parent.set_submodule(norm_name, nn.Identity())
    return fused


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, DomainBatchNorm) or super().is_leaf_module(module, name)


def _pairs(module: nn.Module, uses: dict[nn.Module, int]) -> list[tuple[nn.Module, str, str]]:
    """(module, name of a convolution in it, name of the norm that alone follows it); counts the calls of each layer."""
    if not any(isinstance(m, (DomainBatchNorm, _BatchNorm)) for m in module.modules()):
        return []
    try:
        graph = _Tracer().trace(module)
    except Exception:  # whatever a forward does with a proxy that it cannot use: its parts may be simpler
        return [pair for child in module.children() for pair in _pairs(child, uses)]
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        layer, before = module.get_submodule(node.target), next(iter(node.all_input_nodes), None)
        uses[layer] = uses.get(layer, 0) + 1
        if not isinstance(layer, (DomainBatchNorm, _BatchNorm)) or before is None or before.op != "call_module":
            continue
        if len(before.users) == 1 and type(module.get_submodule(before.target)) in _FUSED_BY:
            pairs.append((module, before.target, node.target))
    return pairs
