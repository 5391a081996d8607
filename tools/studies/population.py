#!/usr/bin/env python
"""One row of the study `population`: a classifier trained with one normalization batch, under all its statistics.

    tools/studies/population.py --norm-batch 2 --out FOLDER [--seed 0] [--batch 128] [--data FOLDER]

It measures what Tables 1 and 2 and Figs. 3 to 6 of *Rethinking "Batch" in BatchNorm* do, all in one training: the
validation error over training under the EMA and under recomputed statistics; the trained model's error under statistics
recomputed from N images, in batches of B, by each method; under minibatch statistics, on training and on validation
images; and with the statistics frozen in the last fifth. Writes `results.json`, errors in percent.
`tools/studies/run.py population` runs all rows.

The data is Fashion-MNIST at half resolution from the folder of Debian's package, or the built-in `patches` if it is
missing; each image has its own intensity, which makes the images of a small normalization batch unlike the population.
"""

import argparse
import copy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from classification_runs import DEBIAN, Block, Split, minibatches, read_data
from torch import Tensor, nn

import domainnorm as dn
from domainnorm.output import write_json

MOMENTUM = 0.1  # of the EMA
VALIDATION = 5120  # images
EARLY, FREEZE_AT = 0.3, 0.8  # shares of the training: where N is looked at, as the paper's epoch 30; Fig. 6
NUMBERS = (10, 100, 1000, 6000)  # N
BATCHES = (2, 10, 100, 1000)  # B, of N = 1000


def make_model(classes: int, norm_batch: int) -> nn.Module:
    """A ResNet of nine blocks, 16 to 64 channels; a feature map of 14 x 14 pixels ends as 2 x 2."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    layers += [nn.MaxPool2d(2), *(Block(16, 16, 1) for _ in range(3))]
    layers += [Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1), Block(32, 64, 2), Block(64, 64, 1)]
    layers += [Block(64, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    model = dn.convert_batchnorm(nn.Sequential(*layers), "GhostBN", samples_per_group=norm_batch, momentum=MOMENTUM)
    for layer in norms(model):
        # what one of many processes, each with one normalization batch of a step, would keep in its buffers
        layer.register_buffer("own_mean", torch.zeros_like(layer.running_mean), persistent=False)
        layer.register_buffer("own_var", torch.ones_like(layer.running_var), persistent=False)
        layer.register_forward_pre_hook(_follow_first_group)
    return model


@torch.no_grad()
def _follow_first_group(layer: Any, inputs: tuple[Tensor, ...]) -> None:
    if layer.training:
        var, mean = torch.var_mean(inputs[0][: layer.samples_per_group], (0, 2, 3))
        layer.own_mean.lerp_(mean, MOMENTUM)
        layer.own_var.lerp_(var, MOMENTUM)


def vary(split: Split, seed: int) -> Split:
    """Black is 0, and each image is multiplied by a log-normal number, as without control of the exposure."""
    factors = torch.exp(1.5 * torch.randn(len(split[1]), 1, 1, 1, generator=torch.Generator().manual_seed(seed)))
    return (split[0] - split[0].min()) * factors, split[1]


def norms(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, dn.GhostBatchNorm)]


@torch.no_grad()
def error(model: nn.Module, split: Split, statistics: str = "population") -> float:
    """In percent; normalization batches under minibatch statistics are of the size of training, of random images."""
    dn.set_statistics(model.eval(), statistics)
    wrong = sum(int((model(x).argmax(1) != y).sum()) for x, y in zip(*(v.split(256) for v in split), strict=True))
    dn.set_statistics(model.train(), "auto")
    return 100 * wrong / len(split[1])


def recomputed(model: nn.Module, images: Tensor, number: int, batch: int, method: str = "pooled") -> nn.Module:
    """A copy with the statistics of `number` random images."""
    twin = copy.deepcopy(model)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(torch.initial_seed()))[:number]
    return dn.recompute_population_statistics(twin, images[chosen].split(batch), number, method, progress=False)


def of_one_process(model: nn.Module) -> nn.Module:
    """A copy with the statistics that `_follow_first_group` kept."""
    twin = copy.deepcopy(model)
    for layer in norms(twin):
        layer.running_mean.copy_(layer.own_mean)
        layer.running_var.copy_(layer.own_var)
    return twin


class Training:
    """A model, its optimizer and its learning rate, which rises over 5 % of the steps and falls linearly to 0."""

    def __init__(self, model: nn.Module, rate: float, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
        self.rate = rate
        self.steps = steps

    def frozen(self, images: Tensor) -> "Training":
        """A copy that goes on with recomputed statistics; γ and β go on learning."""
        twin = Training(recomputed(self.model, images, 1000, 100), self.rate, self.steps)
        twin.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        dn.freeze_batchnorm(twin.model, train_affine=True)
        return twin

    def step(self, number: int, images: Tensor, labels: Tensor, warmup: float = 1.0) -> int:
        """How many images were wrong."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1, (number + 1) / (0.05 * self.steps), warmup) * (1 - number / self.steps)
        self.optimizer.zero_grad()
        logits = self.model(images)
        F.cross_entropy(logits, labels).backward()
        self.optimizer.step()
        return int((logits.argmax(1) != labels).sum())


def run(args: argparse.Namespace) -> dict[str, Any]:
    data = read_data(args.data, 0, VALIDATION)
    (images, labels), validation = vary(data["train"], 1), vary(data["test"], 2)
    images, labels = images[: args.images], labels[: args.images]
    torch.manual_seed(args.seed)
    model = make_model(int(labels.max()) + 1, args.norm_batch)
    epoch = len(labels) // args.batch  # in steps
    training = Training(model, args.rate * args.batch / 128, args.epochs * epoch)
    results: dict[str, Any] = {"curve": {"training": {}, "EMA": {}, "EMA of one process": {}, "recomputed": {}}}
    frozen, wrong, begin = None, 0, int(FREEZE_AT * args.epochs) * epoch
    for number, chosen in enumerate(islice(minibatches(labels, args.batch, ("iid", 0), args.seed), training.steps)):
        if number == begin:
            frozen = training.frozen(images)
        wrong += training.step(number, images[chosen], labels[chosen])
        if frozen:
            frozen.step(number, images[chosen], labels[chosen], warmup=(number - begin + 1) / epoch)
        if (number + 1) % epoch == 0:
            done = (number + 1) // epoch
            point = {
                "training": 100 * wrong / (epoch * args.batch),
                "EMA": error(model, validation),
                "EMA of one process": error(of_one_process(model), validation),
                "recomputed": error(recomputed(model, images, 1000, 100), validation),
            }
            for name, value in point.items():
                results["curve"][name][str(done)] = value
            wrong = 0
            if done == max(round(EARLY * args.epochs), 1):
                results["early"] = against_number(model, images, validation)
    assert frozen is not None
    results["end"] = against_number(model, images, validation)
    results["B"] = {
        method: {str(b): error(recomputed(model, images, 1000, b, method), validation) for b in sizes}
        for method, sizes in (("pooled", BATCHES), ("mean_of_variances", BATCHES), ("exact", (100,)))
    }
    population = recomputed(model, images, NUMBERS[-1], 1000)
    results["training"] = {"minibatch": error(model, (images[:VALIDATION], labels[:VALIDATION]), "minibatch")}
    results["validation"] = {
        "population": error(population, validation),
        "minibatch": error(model, validation, "minibatch"),
        "EMA": error(model, validation),
        "EMA of one process": error(of_one_process(model), validation),
        "frozen": error(frozen.model, validation),
    }
    return results


def against_number(model: nn.Module, images: Tensor, validation: Split) -> dict[str, float]:
    """Error under the EMA, and under statistics of N images in batches of 100."""
    errors = {str(number): error(recomputed(model, images, number, 100), validation) for number in NUMBERS}
    return {"EMA": error(model, validation), **errors}


def main() -> None:
    parser = argparse.ArgumentParser(description="A classifier of one normalization batch size, under all statistics.")
    parser.add_argument("--norm-batch", type=int, required=True, help="number of images normalized together")
    parser.add_argument("--batch", type=int, default=128, help="number of images in an SGD step")
    parser.add_argument("--rate", type=float, default=0.2, help="learning rate for a batch of 128")
    parser.add_argument("--images", type=int, default=6144, help="number of training images")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--data", default=DEBIAN if Path(DEBIAN).exists() else "patches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = run(args)
    write_json(args.out / "results.json", results)


if __name__ == "__main__":
    main()
