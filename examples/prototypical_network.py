#!/usr/bin/env python
"""A prototypical network for few-shot classification, with any norm (*Batch Group Normalization*, few-shot learning).

    examples/prototypical_network.py [--norm BGN] [--episodes 400] [--ways 5] [--shots 1]

Snell et al.'s: an episode has some images of some classes; a query belongs to the class whose mean embedding is
nearest. The classes are generated, random waves with noise, and those of the test are never seen in training. Prints
the accuracy over test episodes under population and under minibatch statistics: the images of an episode are then one
batch, so that a query's prediction depends on the others'.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import domainnorm as dn

SIZE, QUERIES = 24, 5  # pixels; images of a class to be classified


def waves(classes: Tensor, images: int, noise: float, generator: torch.Generator) -> Tensor:
    """Images `(classes, images, 3, SIZE, SIZE)`: each class has a wave of its own, shifted and noisy in each image."""
    place = torch.linspace(0, 1, SIZE)
    rows = []
    for label in classes.tolist():
        own = torch.Generator().manual_seed(label)
        frequency = torch.rand(3, 2, generator=own) * 8 - 4  # of each color along both axes
        shift = torch.rand(images, 1, 1, 1, generator=generator)
        phase = frequency[:, 0, None, None] * place[:, None] + frequency[:, 1, None, None] * place
        rows.append(torch.sin(2 * torch.pi * (phase + shift)))
    clean = torch.stack(rows)
    return clean + noise * torch.randn(clean.shape, generator=generator)


def embedding(norm: str, groups: int) -> nn.Module:
    """Four convolutions with 32 channels, as Conv-4."""
    layers: list[nn.Module] = []
    for before in (3, 32, 32, 32):
        layers += [nn.Conv2d(before, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    return dn.convert_batchnorm(
        nn.Sequential(*layers, nn.Flatten()), norm, **({"num_groups": groups} if norm == "BGN" else {})
    )


def episode(
    model: nn.Module, classes: Tensor, shots: int, noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Logits `(ways · QUERIES, ways)` of the queries, minus squared distances, and their labels."""
    ways = len(classes)
    images = waves(classes, shots + QUERIES, noise, generator)
    features = model(images.flatten(0, 1)).view(ways, shots + QUERIES, -1)
    prototypes, queries = features[:, :shots].mean(1), features[:, shots:].flatten(0, 1)
    return -torch.cdist(queries, prototypes).square(), torch.arange(ways).repeat_interleave(QUERIES)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Few-shot classification with any norm.")
    parser.add_argument("--norm", default="BGN")
    parser.add_argument("--groups", type=int, default=8, help="of a BGN")
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--noise", type=float, default=1.0)
    parser.add_argument("--tests", type=int, default=200, help="test episodes")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = embedding(args.norm, args.groups).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(args.episodes):
        classes = torch.randperm(64, generator=generator)[: args.ways]  # of 64 for training
        logits, labels = episode(model, classes, args.shots, args.noise, generator)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = {}
    for statistics in ("population", "minibatch"):
        dn.set_statistics(model.eval(), statistics)
        right, generator = [], torch.Generator().manual_seed(1)
        for _ in range(args.tests):
            classes = 1000 + torch.randperm(20, generator=generator)[: args.ways]  # of 20 others
            with torch.no_grad():
                logits, labels = episode(model, classes, args.shots, args.noise, generator)
            right.append((logits.argmax(1) == labels).float().mean())
        found[statistics] = 100 * float(torch.stack(right).mean())
    print(f"{args.norm}: " + ", ".join(f"{kind} statistics {value:.1f} %" for kind, value in found.items()))
    return found


if __name__ == "__main__":
    main()
