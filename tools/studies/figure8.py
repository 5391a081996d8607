#!/usr/bin/env python
"""A classifier trained on normalization batches of few classes: Fig. 8 of *Rethinking "Batch" in BatchNorm*.

    tools/studies/figure8.py [--classes 8] [--data FOLDER] [--norm GhostBN] [--groups 32] [--shuffle]
        [--steps 1500] [--seed 0] --out FOLDER

Each image is the sum of one of its class and a fainter one of another class, so that on its own it hardly shows which
of the two is meant; another image of its class in the batch would. An SGD step has eight normalization batches of 32
images, with `--classes` k classes in each and 32 / k images of each class; 0: any. Accuracies under population
statistics (EMA and recomputed) and under those of minibatches of 32, i.i.d. or composed as in training, go to
FOLDER/results.json.
"""

import argparse
import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from classification_runs import read_data
from torch import Tensor, nn

import domainnorm as dn
from domainnorm.data.class_sampler import ClassBatchSampler
from domainnorm.data.sampler import TrainingBatchSampler
from domainnorm.output import output_folder, write_json

BATCH, PARTS = 32, 8  # images normalized together; such batches in an SGD step
SIDE, PATTERNS, WIDTH = 8, 64, 256  # pixels and classes of the generated images; channels of the network
FAINT = 0.95  # contrast of the other image
NOISE = 0.1
RATE = 0.003
EVALUATIONS = 10  # over the training
Images = tuple[Tensor, Tensor]  # (N, D) of mean 0, (N,)


def patterns() -> tuple[Images, Images]:
    """One random image of each class, many times, to train on and to test with: what is added is new each time."""
    images = 4 * F.normalize(torch.randn(PATTERNS, SIDE * SIDE, generator=torch.Generator().manual_seed(0)))
    own = images.repeat(PATTERNS, 1), torch.arange(PATTERNS).repeat(PATTERNS)
    return own, own


def photographs(folder: Path) -> tuple[Images, Images]:
    """Fashion-MNIST at half resolution, from the folder of Debian's package dataset-fashion-mnist."""
    data = read_data(str(folder), 0, 10_000)
    (train, labels), (test, test_labels) = data["train"], data["test"]
    return (train.flatten(1), labels), (test.flatten(1), test_labels)


def minibatches(labels: Tensor, classes: int, order: str, parts: int, seed: int) -> Iterator[Tensor]:
    """Indices of `parts` normalization batches, one after the other, without end."""
    if not classes:
        made: Any = TrainingBatchSampler(
            [(1, 1)] * len(labels), BATCH * parts, group=False, seed=seed, rank=0, world_size=1, start=0
        )
    else:
        made = ClassBatchSampler(
            labels.numpy(),
            BATCH,
            batches=order,
            classes_per_batch=classes,
            with_replacement=False,
            parts=parts,
            seed=seed,
        )
    yield from (torch.tensor([index for index, _ in batch]) for batch in made)


def mixed(data: Images, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each of the chosen images and a fainter one of another class, with noise; and the labels of the former."""
    images, labels = data
    others = torch.randint(len(labels), chosen.shape, generator=generator)
    while (same := labels[others] == labels[chosen]).any():
        others[same] = torch.randint(len(labels), (int(same.sum()),), generator=generator)
    x = images[chosen] + FAINT * images[others]
    return x + NOISE * torch.randn(x.shape, generator=generator), labels[chosen]


def make_model(inputs: int, classes: int, norm: str, options: dict[str, Any]) -> nn.Module:
    """Three hidden layers."""
    layers: list[nn.Module] = []
    for before in (inputs, WIDTH, WIDTH):
        layers += [nn.Linear(before, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU()]
    return dn.convert_batchnorm(nn.Sequential(*layers, nn.Linear(WIDTH, classes)), norm, **options)


@torch.no_grad()
def accuracy(model: nn.Module, data: Images, classes: int, statistics: str, count: int) -> float:
    """Percent, over `count` minibatches of 32 images; the same ones in each call."""
    model.eval()
    if statistics == "minibatch":
        dn.set_statistics(model, statistics)
    generator, right = torch.Generator().manual_seed(1), 0
    for chosen in itertools.islice(minibatches(data[1], classes, "few_classes", 1, seed=1), count):
        x, y = mixed(data, chosen, generator)
        right += int((model(x).argmax(1) == y).sum())
    dn.set_statistics(model, "auto")
    return 100 * right / (count * BATCH)


def evaluate(model: nn.Module, train: Images, test: Images, classes: int, count: int) -> dict[str, float]:
    """The four accuracies; of a norm that has no batch, the first."""
    found = {"population": accuracy(model, test, 0, "auto", count)}
    if not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
        return found
    generator = torch.Generator().manual_seed(2)
    batches = itertools.islice(minibatches(train[1], 0, "iid", PARTS, seed=2), max(count // PARTS, 1))
    twin = dn.recompute_population_statistics(
        copy.deepcopy(model), (mixed(train, chosen, generator)[0] for chosen in batches), progress=False
    )
    return found | {
        "recomputed": accuracy(twin, test, 0, "auto", count),
        "minibatch": accuracy(model, test, 0, "minibatch", count),
        "minibatch as in training": accuracy(model, test, classes, "minibatch", count),
    }


def train(args: argparse.Namespace, data: Images, test: Images) -> dict[str, Any]:
    """Accuracies by step; the last ones are `"final"`."""
    torch.manual_seed(args.seed)
    options: dict[str, Any] = {"GN": {"num_groups": 16}, "BN": {}}.get(args.norm, {"samples_per_group": args.groups})
    if args.norm == "BRN":  # the paper's schedule, 5k, 25k and 40k steps of 130k, as shares
        parts = {"r_max": ((0.04, 1), (0.3, 3)), "d_max": ((0.04, 0), (0.2, 5))}
        options |= {key: [(share * args.steps, value) for share, value in of] for key, of in parts.items()}
    model = make_model(data[0].shape[1], int(data[1].max()) + 1, args.norm, options)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    generator = torch.Generator().manual_seed(args.seed)
    # GhostBN over fewer images than a minibatch has: each of its classes once
    order = "few_classes" if args.groups == BATCH else "few_classes_in_rounds"
    found: dict[str, Any] = {}
    for step, chosen in enumerate(minibatches(data[1], args.classes, order, PARTS, args.seed)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / args.steps)
        x, y = mixed(data, chosen, generator)
        if args.shuffle:
            places = torch.randperm(len(x), generator=generator)
            x, y = x[places], y[places]
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
        if (step + 1) % max(args.steps // EVALUATIONS, 1) == 0:
            found[str(step + 1)] = evaluate(model, data, test, args.classes, args.count)
            print(step + 1, found[str(step + 1)], flush=True)
        if step + 1 == args.steps:
            return {"steps": found, "final": evaluate(model, data, test, args.classes, 4 * args.count)}
    raise AssertionError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A classifier trained on normalization batches of few classes.")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST; without it, generated images")
    parser.add_argument("--classes", type=int, default=8, help="k, classes in each batch of 32 images; 0: any")
    parser.add_argument("--norm", choices=("BN", "GhostBN", "BRN", "GN"), default="GhostBN", help="BN: over all images")
    parser.add_argument(
        "--groups", type=int, default=BATCH, help="number of images that GhostBN and BRN normalize together"
    )
    parser.add_argument(
        "--shuffle", action="store_true", help="shuffle the images of a step over its normalization batches"
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument(
        "--count", type=int, default=64, help="number of minibatches in an evaluation; four times as many at the end"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    results = train(args, *(photographs(args.data) if args.data else patterns()))
    write_json(output_folder(args.out, "--out") / "results.json", results)


if __name__ == "__main__":
    main()
