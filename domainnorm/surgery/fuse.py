"""Norms folded into the convolutions before them, for deployment."""

import copy
import inspect
from collections import Counter
from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import DomainBatchNorm

_BatchNorm = nn.modules.batchnorm._BatchNorm
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fuse(model: nn.Module) -> nn.Module:
    """Copy `model` for inference, with each BatchNorm right after a convolution folded into it by torch's fusion.

    To find what follows what, the model is traced (`torch.fx`) with the default arguments of its `forward`. If that
    fails on its control flow, its parts are traced instead. These must then be called as they are: a parent that runs a
    child's layers itself is not noticed. Norms that follow something else are not folded, nor are layers that are used
    several times or have hooks, nor norms that one convolution cannot replace: with statistics per domain, with
    statistics of the sample (SeqNorm), or with statistics that are not per channel (BGN, GBGN).

    Args:
        model: in eval mode; it is not changed.

    Returns:
        The copy.

    Raises:
        ValueError: a norm is in training mode, or uses minibatch statistics or an `example_weight`, which a convolution
            cannot represent. Fuse after training, not before fine-tuning: a fused affine is a different optimization
            problem (*Rethinking "Batch"*, App. A.8).

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), dn.DomainBatchNorm(16)).eval()
        >>> dn.fuse(model)
        Sequential(
          (0): Conv2d(3, 16, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
    """
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if module.training:
            raise ValueError(
                f"{name or 'the model'} is in training mode: call eval() first, and fuse after training only, because "
                "a fused model is optimized differently"
            )
        if isinstance(module, DomainBatchNorm) and (module.uses_minibatch or module.example_weight):
            what = "minibatch statistics" if module.uses_minibatch else f"example_weight={module.example_weight}"
            raise ValueError(f"{name or 'the model'} uses {what}, which cannot be fused")
    fused = copy.deepcopy(model)
    names = Counter(module for _, module in fused.named_modules(remove_duplicate=False))
    uses: Counter[nn.Module] = Counter()
    for parent, conv_name, norm_name in _pairs(fused, uses):
        conv: Any = parent.get_submodule(conv_name)
        norm: Any = parent.get_submodule(norm_name)
        shapes = [v.ndim for v in (norm.running_mean, norm.weight) if v is not None]
        if max(uses[conv], uses[norm], names[conv], names[norm], *shapes) == 1 and norm.running_mean is not None:
            parent.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
            parent.set_submodule(norm_name, nn.Identity())
    return fused


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, DomainBatchNorm) or super().is_leaf_module(module, name)


def _pairs(module: nn.Module, uses: Counter[nn.Module]) -> list[tuple[nn.Module, str, str]]:
    """(module, name of a convolution in it, name of the norm that alone follows it); counts the calls of each layer."""
    if not any(isinstance(m, _BatchNorm) for m in module.modules()):
        return []
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    try:
        graph = _Tracer().trace(module, concrete_args=defaults)
    except Exception:  # whatever a forward does with a proxy that it cannot use: its parts may be simpler
        return [pair for child in module.children() for pair in _pairs(child, uses)]
    # parameters that the forward reads itself
    read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        layer, before = module.get_submodule(node.target), next(iter(node.all_input_nodes), None)
        uses[layer] += 1
        if not isinstance(layer, _BatchNorm) or not getattr(layer, "is_channel_affine", True):
            continue
        if before is None or before.op != "call_module":
            continue
        conv = module.get_submodule(before.target)
        alone = node.args == (before,) and not node.kwargs and len(before.users) == 1
        seen = before.target in read or _hooked(conv) or _hooked(layer)
        if alone and not seen and type(conv) in _CONVOLUTIONS:
            pairs.append((module, before.target, node.target))
    return pairs


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
