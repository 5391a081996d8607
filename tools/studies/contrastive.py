#!/usr/bin/env python
"""A small MoCo whose BatchNorm leaks which key belongs to a query: §6.2 of *Rethinking "Batch" in BatchNorm*.

    tools/studies/contrastive.py [--norm GhostBN] [--keys "" | shuffled | population] [--data FOLDER] [--steps 1200]
        [--processes 2] [--seed 0] --out FOLDER

A query encoder learns to find, among the keys in a queue, the key of another view of its image; the key encoder is its
moving average. Each process has eight normalization batches of 8 images (GhostBN): two processes stand for sixteen. The
batches of a query and of its key have the same images, those of the keys in the queue do not. `--keys shuffled`: the
images are permuted over all batches of all processes before the key encoder. `--keys population`: the key encoder
normalizes by moving averages of the query encoder's statistics. `--norm SyncBN` normalizes over all images of all
processes, GN over none. FOLDER/results.json has the accuracy of the training task, under the statistics of training and
of the population, and those of a nearest-neighbor and a linear classifier on the features, under population statistics.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from classification_runs import read_data
from torch import Tensor, nn

import domainnorm as dn
from domainnorm.distributed import all_gather_stack, all_reduce_sum, launch, rank, world_size
from domainnorm.engine.step import distributed
from domainnorm.output import output_folder, write_json

DEBIAN = "/usr/share/datasets/fashion-mnist"
BATCH, GROUP = 64, 8  # images of a process in a step; of them, normalized together
CHANNELS, FEATURES = 256, 64
QUEUE, TEMPERATURE, MOMENTUM = 1024, 0.1, 0.99
NORMS: dict[str, dict[str, Any]] = {"GhostBN": {"samples_per_group": GROUP}, "SyncBN": {}, "GN": {"num_groups": 8}}


def make_encoder(pixels: int, norm: str) -> nn.Module:
    """Three hidden layers, whose output is what is learned, and a projection."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before in (pixels, CHANNELS, CHANNELS):
        layers += [nn.Linear(before, CHANNELS, bias=False), nn.BatchNorm1d(CHANNELS), nn.ReLU()]
    model = nn.Sequential(nn.Sequential(*layers), nn.Linear(CHANNELS, FEATURES))
    return dn.convert_batchnorm(model, norm, **NORMS[norm])


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of other proportions, mirrored, of other brightness and contrast, with noise: `(N, 1, H, W)`."""
    n = len(images)

    def random(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    width = random(0.7, 1.0)
    height = (width * random(0.75, 1.25)).clamp(max=1)
    place = torch.zeros(n, 2, 3)
    place[:, 0, 0] = width * (2 * torch.randint(2, (n,), generator=generator) - 1)
    place[:, 1, 1] = height
    place[:, :, 2] = random(-1.0, 1.0, 2) * (1 - torch.stack([width, height], dim=1))
    grid = F.affine_grid(place, list(images.shape), align_corners=False)
    cropped = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    brightness = 0.1 * torch.randn(n, 1, 1, 1, generator=generator)
    return cropped * random(0.9, 1.1, 1, 1, 1) + brightness + 0.1 * torch.randn(images.shape, generator=generator)


def scores(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """Cosine similarities of each query and its key `(N, 1)`, and all keys of the queue `(N, K)`, over temperature."""
    return torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], dim=1) / TEMPERATURE


@torch.no_grad()
def follow(key: nn.Module, query: nn.Module, buffers: bool) -> None:
    """Move the key encoder towards the query encoder."""
    for own, new in zip(key.parameters(), query.parameters(), strict=True):
        own.lerp_(new, 1 - MOMENTUM)
    for own, new in zip(key.buffers(), query.buffers(), strict=True):
        if buffers:
            own.copy_(own.lerp(new, 1 - MOMENTUM) if own.is_floating_point() else new)


def train(args: argparse.Namespace, images: Tensor) -> tuple[nn.Module, nn.Module, float]:
    """The encoders, and the accuracy of the last tenth of the steps, in percent."""
    torch.manual_seed(args.seed)
    query = make_encoder(images[0].numel(), args.norm)
    key = copy.deepcopy(query).requires_grad_(False)
    if args.keys == "population":
        dn.set_statistics(key, "population")
    key_encoder = dn.RoIShuffle(key, args.seed, in_order=True) if args.keys == "shuffled" else key
    model = distributed(query, torch.device("cpu"))
    optimizer = torch.optim.Adam(query.parameters(), args.rate)
    queue = F.normalize(torch.randn(QUEUE, FEATURES), dim=1)  # the same on all ranks
    generator = torch.Generator().manual_seed(world_size() * args.seed + rank())
    right, last = torch.zeros(2), args.steps - max(args.steps // 10, 1)
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = args.rate * (1 - step / args.steps)
        chosen = images[torch.randint(len(images), (BATCH,), generator=generator)]
        queries = F.normalize(model(view(chosen, generator)), dim=1)
        with torch.no_grad():
            follow(key, query, args.keys == "population")
            keys = F.normalize(key_encoder(view(chosen, generator)), dim=1)
        logits = scores(queries, keys, queue)
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long)).backward()
        optimizer.step()
        new = all_gather_stack(keys).flatten(0, 1) if world_size() > 1 else keys
        queue = torch.cat([queue[len(new) :], new])
        if step >= last:
            right += torch.tensor([float((logits.argmax(1) == 0).sum()), BATCH])
    right = all_reduce_sum(right)
    return query, key, float(100 * right[0] / right[1])


@torch.no_grad()
def measure(query: nn.Module, key: nn.Module, data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Percent, all in eval mode: of the training task, and of 10 nearest neighbors and a linear classifier."""
    query.eval(), key.eval()
    generator = torch.Generator().manual_seed(0)
    images = data["train"][0][: QUEUE + 1000]
    queries, keys = (F.normalize(model(view(images, generator)), dim=1) for model in (query, key))
    pretext = scores(queries[QUEUE:], keys[QUEUE:], keys[:QUEUE]).argmax(1) == 0
    (known, labels), (asked, answers) = ((F.normalize(query[0](x), dim=1), y) for x, y in (data["val"], data["test"]))
    nearest = (asked @ known.T).topk(10, dim=1).indices
    votes = F.one_hot(labels[nearest]).sum(1).argmax(1)
    known, asked = (F.pad(x, (0, 1), value=1.0) for x in (known, asked))  # one is the bias
    ridge = known.T @ known + 1e-4 * len(known) / CHANNELS * torch.eye(CHANNELS + 1)
    linear = asked @ torch.linalg.solve(ridge, known.T @ F.one_hot(labels).float())
    found = {"pretext": pretext, "kNN": votes == answers, "linear": linear.argmax(1) == answers}
    return {name: float(100 * right.float().mean()) for name, right in found.items()}


def run(args: argparse.Namespace) -> None:
    """On every rank."""
    data = read_data(args.data, min(5000, args.images // 2), 5000)
    query, key, pretext = train(args, data["train"][0][: args.images])
    if world_size() > 1 and args.norm == "GhostBN":  # each rank has statistics of its own images
        dn.merge_population_statistics(query)
        dn.merge_population_statistics(key)
    if rank() == 0:
        results = {"pretext in training": pretext, **measure(query, key, data)}
        print(results)
        write_json(output_folder(args.out, "--out") / "results.json", results)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A small MoCo, and what its BatchNorm leaks.")
    parser.add_argument("--data", default=DEBIAN, help="folder of Fashion-MNIST, or 'patches'")
    parser.add_argument("--images", type=int, default=20_000, help="number of training images")
    parser.add_argument("--norm", choices=list(NORMS), default="GhostBN")
    parser.add_argument(
        "--keys", choices=("", "shuffled", "population"), default="", help="how the keys are normalized"
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=0.002, help="learning rate; 0: untrained")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    launch(run, (args,), num_processes=args.processes)


if __name__ == "__main__":
    main()
