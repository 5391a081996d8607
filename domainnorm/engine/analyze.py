"""What a model costs: parameters and multiply-adds of its parts, time for an image."""

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fvcore.nn import parameter_count
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..surgery.domains import use_domains_of


@dataclass(frozen=True)
class Part:
    """A part of a model, by its name; "" is the whole.

    Attributes:
        parameters, trained: numbers of all, and of those that require a gradient; shared ones count in each part.
        multiply_adds: of one image, in the convolutions and matrix products (what fvcore and most papers call FLOPs).
    """

    name: str
    parameters: int
    trained: int
    multiply_adds: float


@torch.no_grad()
def costs(model: nn.Module, images: Sequence[Tensor], depth: int = 2) -> list[Part]:
    """The parts of a model that predicts, from the whole on, with the mean cost of `images`, one at a time.

    Args:
        model: called with a list of one image, in eval mode.
        depth: how many names of modules, one within the other, make a part.
    """
    _first_domain(model)
    total: dict[str, int] = {}
    for image in images:
        with FlopCounterMode(display=False) as counter:
            model([image])
        for name, kinds in counter.get_flop_counts().items():
            total[name] = total.get(name, 0) + sum(kinds.values())
    parameters = parameter_count(model)
    root = type(model).__name__
    found = [_part("", _flops(total, root, model), parameters, model, len(images))]
    for name, module in model.named_modules():
        levels = name.count(".") + 1
        has_children = any(True for _ in module.named_children())
        if name and (levels == depth or (levels < depth and not has_children)):
            part = _part(name, _flops(total, f"{root}.{name}", module), parameters, module, len(images))
            found += [part] if part.parameters or part.multiply_adds else []
    return found


def _flops(total: dict[str, int], path: str, module: nn.Module) -> int:
    """Those counted for a module or, where others call its children without it, for these."""
    if path in total:
        return total[path]
    return sum(_flops(total, f"{path}.{name}", child) for name, child in module.named_children())


def _part(name: str, flops: int, parameters: dict[str, int], module: nn.Module, images: int) -> Part:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Part(name, parameters[name], trained, flops / 2 / images)


@torch.no_grad()
def seconds_per_image(model: nn.Module, images: Sequence[Tensor], *, warm_up: int = 3) -> float:
    """The median over `images`, one at a time, after some that are not counted."""
    _first_domain(model)
    found = []
    device = images[0].device
    for k, image in enumerate(itertools.chain(itertools.islice(itertools.cycle(images), warm_up), images)):
        began = time.perf_counter()
        model([image])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if k >= warm_up:
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def _first_domain(model: nn.Module) -> None:
    """Where data sets are domains, all cost the same."""
    use_domains_of(model, [{"domain": torch.tensor(0)}])
