#!/usr/bin/env python
"""Adversarial training by PGD with any norm of domainnorm (*Batch Group Normalization*, Table 5).

    examples/adversarial_training.py [--norm BGN] [--steps 300] [--data patches_train]

Madry et al.'s: each batch is moved, within 8/255 of every pixel, to where its loss is large, and the network is
trained on it. Prints the accuracy on clean images and on attacked ones. With CIFAR-10 below $DETECTRON2_DATASETS, the
paper's is `--data cifar10_train --test cifar10_test --network cifar_wide_resnet10_2 --steps 35000`.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import domainnorm as dn
from domainnorm.data import ClassificationDataset

EPSILON, STEP = 8 / 255, 2 / 255  # of a pixel in [0, 1]


def attacked(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Images within EPSILON of the given ones, by so many steps uphill from a random start.

    The model attacks in eval mode: under population statistics an image does not depend on the others of its batch.
    """
    training = model.training
    model.eval()
    x = (images + torch.empty_like(images).uniform_(-EPSILON, EPSILON)).clamp(0, 1)
    for _ in range(steps):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
        x = x.detach() + STEP * gradient.sign()
        x = x.clamp(images - EPSILON, images + EPSILON).clamp(0, 1)
    model.train(training)
    return x


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, attack: int) -> float:
    """Percent, of images attacked by so many steps; 0: of clean ones."""
    model.eval()
    right = 0
    for x, y in zip(images.split(100), labels.split(100), strict=True):
        x = attacked(model, x, y, attack) if attack else x
        with torch.no_grad():
            right += int((model(x).argmax(1) == y).sum())
    return 100 * right / len(labels)


def read(name: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images, float32 `(N, 3, H, W)` in [0, 1], and their labels."""
    data = ClassificationDataset(name)
    images = torch.stack([data[i][0].as_subclass(Tensor) for i in range(min(count, len(data)))])
    return images.float() / 255, data.labels[: len(images)]


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Adversarial training with any norm.")
    parser.add_argument("--norm", default="BGN")
    parser.add_argument("--groups", type=int, default=16, help="of a BGN")
    parser.add_argument("--network", default="cifar_resnet8")
    parser.add_argument("--data", default="patches_train")
    parser.add_argument("--test", default="patches_val")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--attack", type=int, default=5, help="steps of PGD in training; twice as many in the test")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    images, labels = read(args.data, args.images)
    words = ["MODEL.META_ARCHITECTURE", "Classifier", "MODEL.BACKBONE.NAME", args.network]
    words += ["MODEL.BACKBONE.NORM", args.norm, "MODEL.NORM.BGN.NUM_GROUPS", args.groups]
    words += ["MODEL.CLASSIFIER.NUM_CLASSES", int(labels.max()) + 1, "INPUT.CROP_SIZE", images.shape[-1]]
    model = dn.build_model(dn.load_config(None, words))
    device = next(model.parameters()).device
    network = nn.Sequential(Normalized(model), model.body).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for _ in range(args.steps):
        chosen = torch.randint(len(labels), (64,))
        x, y = images[chosen].to(device), labels[chosen].to(device)
        loss = F.cross_entropy(network(attacked(network, x, y, args.attack)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    test, truth = (v.to(device) for v in read(args.test, 500))
    found = {
        "clean": accuracy(network, test, truth, 0),
        "attacked": accuracy(network, test, truth, 2 * args.attack),
    }
    print(f"{args.norm}: " + ", ".join(f"{kind} {value:.1f} %" for kind, value in found.items()))
    return found


class Normalized(nn.Module):
    """Pixels as the classifier's body takes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", model.image_mean.clone())
        self.register_buffer("std", model.image_std.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


if __name__ == "__main__":
    main()
