"""Layers of a model, exchanged for others."""

from collections.abc import Callable

from torch import nn


def check_affine(layer: nn.Module) -> None:
    """ValueError if γ or β is computed from other parameters, pruned or parametrized, which a new layer would lose."""
    for key in ("weight", "bias"):
        if getattr(layer, key, None) is not None and key not in layer._parameters:
            raise ValueError(
                f"its {key} is pruned or parametrized, which another layer would lose: make it a parameter again by "
                f"torch.nn.utils.prune.remove(layer, {key!r}) or "
                f"torch.nn.utils.parametrize.remove_parametrizations(layer, {key!r})"
            )


def replace_layers(model: nn.Module, replace: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """Put `replace(name, module)` in the place of every module, from the outside in; returns the model.

    A module that is replaced is not entered. One that has several names stays one.

    Args:
        replace: returns the new module, or the given one to leave it.
    """
    done: dict[nn.Module, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> nn.Module:
        if module in done:
            return done[module]
        done[module] = module
        new = replace(name, module)
        if new is not module:
            done[module] = new
            return new
        for child_name, child in module._modules.items():
            if child is not None:
                module._modules[child_name] = visit(f"{name}.{child_name}".lstrip("."), child)
        return module

    return visit("", model)
