#!/usr/bin/env python
"""What recomputed statistics cost: the row `time` of the study `population`.

    tools/studies/population_time.py --out FOLDER [--seed 0]

CPU times on a ResNet-50, relative to one forward pass over the same images: for methods "pooled" and "exact", and for
the exact statistics computed layer by layer, as the paper describes. Writes `results.json`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import domainnorm as dn
from domainnorm.output import write_json


def _note(moments: list[dn.Moments], _: nn.Module, args: Any) -> None:
    moments.append(dn.Moments.rows(args[0]).merge(0))


@torch.no_grad()
def layer_by_layer(model: nn.Module, batches: list[Tensor]) -> None:
    """For each layer one pass over all images, the layers before it being done (*Rethinking "Batch"*, App. A.3)."""
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    model.eval()
    for layer in layers:
        moments: list[dn.Moments] = []
        hook = layer.register_forward_pre_hook(partial(_note, moments))
        for batch in batches:
            model(batch)
        hook.remove()
        merged = dn.Moments.cat(moments).merge(0)
        layer.running_mean.copy_(merged.mean[0])
        layer.running_var.copy_(merged.var[0])  # which normalizes, as in one batch


@torch.no_grad()
def forward(model: nn.Module, batches: list[Tensor]) -> None:
    for batch in batches:
        model.eval()(batch)


def timed(function: Callable[[], Any]) -> float:
    began = time.process_time()  # other processes do not count
    function()
    return time.process_time() - began


def measure(model: nn.Module, batches: list[Tensor], repeats: int = 5) -> dict[str, float]:
    """Ratios of medians, in turn; the first is a warm-up."""
    recompute = partial(dn.recompute_population_statistics, model, batches, 10_000, progress=False)
    functions = {"forward": partial(forward, model, batches)}
    functions |= {method: partial(recompute, method=method) for method in ("pooled", "exact")}
    times = [{name: timed(function) for name, function in functions.items()} for _ in range(repeats + 1)]
    medians = {name: statistics.median(turn[name] for turn in times[1:]) for name in functions}
    medians["layer by layer"] = timed(partial(layer_by_layer, model, batches))
    return {name: value / medians["forward"] for name, value in medians.items() if name != "forward"}


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of recomputed statistics.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = torchvision.models.resnet50(num_classes=10)
    write_json(args.out / "results.json", measure(model, list(torch.randn(32, 3, 64, 64).split(8))))


if __name__ == "__main__":
    main()
