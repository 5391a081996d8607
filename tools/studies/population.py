#!/usr/bin/env python
"""What Tables 1 and 2 of *Rethinking "Batch" in BatchNorm* show, on a small classifier; and what exact statistics cost.

    tools/studies/population.py [--out docs/studies] [--images 3000] [--steps 300]

A classifier of objects cut from the built-in data set is trained twice: with a large learning rate and normalization
batches of 64, looked at in mid-training (Table 1), and with normalization batches of 2 (Table 2). Its validation error
is measured under the EMA and under statistics recomputed by each method, from N images in batches of B. Then the time
of method "exact" on ResNet-50 is compared with one forward pass, and with the algorithm that goes layer by layer.
Writes population.json, population.md and population.png.
"""

import argparse
import copy
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resized_crop

import domainnorm as dn
from domainnorm.data.scene import CLASSES, LOOKS, draw_scene
from domainnorm.statistics.recompute import METHODS

SIZE = 32  # pixels of an object's image
SEEDS = (0, 1, 2)  # of the images from which statistics are recomputed
TABLE_2 = """\
Table 2 of the paper does not show here. There, larger B is better (validation error 35.5 with the EMA; 34.4, 32.3,
32.0 and 32.0 with B = 2, 10, 100 and N); here B = 2 is the best. The differences between B are at most ten of 1500
validation images, of one small model that was trained once: too few to say why."""


def objects(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` objects, cut out with a margin, in noisy grey: float32 `(count, 1, SIZE, SIZE)`, and their classes."""
    images: list[Tensor] = []
    labels: list[int] = []
    for number in range(10**9):
        scene = draw_scene(LOOKS["night"], np.random.default_rng([seed, number]))
        pixels = torch.from_numpy(scene.image).permute(2, 0, 1)
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            ys, xs = mask.nonzero()
            top, left, side = int(ys.min()) - 2, int(xs.min()) - 2, int(max(np.ptp(ys), np.ptp(xs))) + 5
            images.append(resized_crop(pixels, top, left, side, side, [SIZE, SIZE], antialias=True))
            labels.append(label)
        if len(images) >= count:
            grey = torch.stack(images[:count]).float().mean(1, keepdim=True) / 255 - 0.3
            noise = 0.1 * torch.randn(grey.shape, generator=torch.Generator().manual_seed(seed))
            return grey + noise, torch.tensor(labels[:count])
    raise AssertionError


def make_model() -> nn.Module:
    """Six convolutions with BatchNorm."""
    layers: list[nn.Module] = []
    for width, before in ((32, 1), (32, 32), (64, 32), (64, 64), (128, 64), (128, 128)):
        layers += [nn.Conv2d(before, width, 3, 1 + (before != width and before > 1), 1, bias=False)]
        layers += [dn.DomainBatchNorm(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, len(CLASSES)))


def train(images: Tensor, labels: Tensor, steps: int, batch: int, passes: int, rate: float, seed: int) -> nn.Module:
    """SGD on `passes` batches a step, each a normalization batch of its own."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20)
        optimizer.zero_grad()
        for part in torch.randint(len(images), (passes, batch)):
            (F.cross_entropy(model(images[part]), labels[part]) / passes).backward()
        optimizer.step()
    return model


@torch.no_grad()
def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent, under the population statistics."""
    model.eval()
    wrong = sum((model(x).argmax(1) != y).sum() for x, y in zip(images.split(250), labels.split(250), strict=True))
    return 100 * float(wrong) / len(labels)


def recomputed_error(model: nn.Module, data: dict[str, Any], number: int, batch: int, method: str) -> float:
    """Mean over `SEEDS` of the error with statistics recomputed from `number` images in batches of `batch`."""
    errors = []
    for seed in SEEDS:
        chosen = torch.randperm(len(data["train"][0]), generator=torch.Generator().manual_seed(seed))[:number]
        twin = copy.deepcopy(model)
        batches = data["train"][0][chosen].split(batch)
        dn.recompute_population_statistics(twin, batches, number, method, progress=False)
        errors.append(error(twin, *data["val"]))
    return statistics.mean(errors)


def table_1(data: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Error against N; mid-training, at a learning rate that moves the weights faster than the EMA follows."""
    rows = []
    for done in (steps // 4, steps):
        model = train(*data["train"], done, 64, 1, rate=0.4, seed=0)
        rows.append({"steps": done, "method": "EMA", "N": 0, "error": error(copy.deepcopy(model), *data["val"])})
        for method in METHODS:
            for number in (100, 1000, len(data["train"][0])):
                value = recomputed_error(model, data, number, 100, method)
                rows.append({"steps": done, "method": method, "N": number, "error": value})
    return rows


def table_2(data: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Error against B, for a model trained with normalization batches of 2."""
    model = train(*data["train"], steps, 2, 16, rate=0.05, seed=0)
    rows = [{"method": "EMA", "B": 2, "error": error(copy.deepcopy(model), *data["val"])}]
    for method in METHODS:
        for batch in (2, 10, 100, 1000):
            rows.append({"method": method, "B": batch, "error": recomputed_error(model, data, 1000, batch, method)})
    return rows


def _note(moments: list[dn.Moments], _: nn.Module, args: Any) -> None:
    moments.append(dn.Moments.rows(args[0]).merge(0))


@torch.no_grad()
def layer_by_layer(model: nn.Module, batches: list[Tensor]) -> None:
    """Exact statistics as the paper describes them: for each layer one pass, all layers before it being done."""
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
        layer.running_var.copy_(merged.var[0])


@torch.no_grad()
def cost() -> dict[str, Any]:
    """Ratios of medians of CPU times, in one run, in turn."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=10)
    batches = list(torch.randn(64, 3, 96, 96).split(16))

    def forward() -> None:
        for batch in batches:
            model.eval()(batch)

    def timed(function: Any, *args: Any) -> float:
        began = time.process_time()  # other processes do not count
        function(*args)
        return time.process_time() - began

    times: dict[str, list[float]] = {"forward": [], "exact": [], "pooled": []}
    for _ in range(6):  # the first is a warm-up
        times["forward"].append(timed(forward))
        for method in ("exact", "pooled"):
            recompute = partial(dn.recompute_population_statistics, model, batches, 64, method, progress=False)
            times[method].append(timed(recompute))
    slow = timed(layer_by_layer, model, batches)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    ratios = {name: value / medians["forward"] for name, value in medians.items() if name != "forward"}
    layers = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return {"norm layers": layers, **ratios, "layer by layer": slow / medians["forward"]}


def report(results: dict[str, Any], folder: Path) -> None:
    """population.json, population.md and population.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "population.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = [
        *("# Population statistics: EMA and recomputed", "", f"`{results['command']}`  ", f"{results['machine']}.", ""),
        *("Validation errors in percent; recomputed: means of three draws of images.", "", "## Error against N", ""),
        *("Trained with normalization batches of 64 and learning rate 0.4; B = 100.", ""),
    ]
    for steps in sorted({row["steps"] for row in results["table 1"]}):
        lines += [f"After {steps} steps:", "", *_table([r for r in results["table 1"] if r["steps"] == steps], "N"), ""]
    lines += ["## Error against B", "", "Trained with normalization batches of 2; N = 1000.", ""]
    lines += [*_table(results["table 2"], "B"), "", *TABLE_2.splitlines(), ""]
    lines += ["![error against B](population.png)", "", "## Time", ""]
    own = results["cost"]
    lines += [
        f"ResNet-50 with {own['norm layers']} norm layers, 4 batches of 16 images of 96 x 96 pixels. CPU time, divided",
        f"by that of one forward pass over them: exact {own['exact']:.2f}, pooled {own['pooled']:.2f},",
        f"exact layer by layer {own['layer by layer']:.1f}.",
    ]
    (folder / "population.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.5))
    rows = results["table 2"]
    axis.axhline(rows[0]["error"], color="grey", linestyle=":", label="EMA")
    for method in METHODS:
        points = [(row["B"], row["error"]) for row in rows if row["method"] == method]
        axis.plot(*zip(*points, strict=True), marker="o", label=method)
    axis.set(xscale="log", xlabel="B, images in a batch of the recomputation", ylabel="validation error, %")
    axis.legend()
    figure.tight_layout()
    figure.savefig(folder / "population.png", dpi=100, metadata={"Software": None})


def _table(rows: list[dict[str, Any]], key: str) -> list[str]:
    """The first row is the EMA's; the others are of each method, by increasing `key`."""
    values = sorted({row[key] for row in rows[1:]})
    lines = [f"| method | {' | '.join(f'{key} = {value}' for value in values)} |", "|---" * (len(values) + 1) + "|"]
    lines.append(f"| EMA | {rows[0]['error']:.2f} |{' |' * (len(values) - 1)}")
    for method in METHODS:
        cells = [f"{row['error']:.2f}" for row in rows if row["method"] == method]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Error and cost of population statistics.")
    parser.add_argument("--out", type=Path, default=Path("docs/studies"))
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    data = {"train": objects(args.images, seed=1), "val": objects(max(args.images // 2, 100), seed=2)}
    results = {
        "command": f"tools/studies/population.py --images {args.images} --steps {args.steps}",
        "machine": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, torch {torch.__version__}, seed 0",
        "table 1": table_1(data, args.steps),
        "table 2": table_2(data, args.steps),
        "cost": cost(),
    }
    report(results, args.out)
    print((args.out / "population.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
