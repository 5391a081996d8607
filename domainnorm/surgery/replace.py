"""Layers of a model, exchanged for others."""

from collections.abc import Callable

from torch import nn


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
