"""Generated images, and models trained on them for seconds: what the cases of the audit's study consist of."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 4


def images(count: int, size: int = 32, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Stripes whose direction is the class, in random color, contrast and noise: `(N, 3, size, size)` and labels.

    Args:
        shift: another source of images: darker or lighter by so much, in the same proportion sharper.
    """
    labels = torch.randint(CLASSES, (count,))
    angle = labels * math.pi / CLASSES + 0.1 * torch.randn(count)
    axis = torch.linspace(-1, 1, size)
    wave = 6 + 4 * torch.rand(count)
    phase = (axis[None, :, None] * angle.sin()[:, None, None] + axis[None, None] * angle.cos()[:, None, None]) * (
        wave[:, None, None]
    )
    stripes = (phase + 6.3 * torch.rand(count)[:, None, None]).sin()[:, None]
    color, contrast = torch.randn(count, 3, 1, 1) * 0.5, 0.5 + torch.rand(count, 3, 1, 1)
    x = color + contrast * stripes + 0.3 * torch.randn(count, 3, size, size)
    return x * math.exp(shift) + 2 * shift, labels


def batches(count: int, batch: int, size: int = 32, shift: float = 0.0) -> list[Tensor]:
    """Images alone, as `dn.audit` takes them."""
    return [images(batch, size, shift)[0] for _ in range(count)]


Step = Callable[[nn.Module], Tensor]  # the loss of one batch


def classify(batch: int, size: int = 32, source: Callable[[int], float] = lambda step: 0.0) -> Iterator[Step]:
    """Batches of classification for ever; `source(step)` is the `shift` of each."""
    step = 0
    while True:
        x, labels = images(batch, size, source(step))
        yield lambda model, x=x, labels=labels: nn.functional.cross_entropy(_logits(model(x)), labels)
        step += 1


def _logits(output: Any) -> Tensor:
    """The main outputs of classifiers with auxiliary outputs, and of segmentation models."""
    if isinstance(output, dict):
        output = output["out"].mean((2, 3))
    return output if isinstance(output, Tensor) else output[0]


def train(
    model: nn.Module, data: Iterator[Step], steps: int, rate: float = 0.02, accumulate: int = 1, falls: bool = True
) -> nn.Module:
    """SGD with a rate that falls to 0 as a cosine, or does not yet; leaves the modes of the layers as they are."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            (next(data)(model) / accumulate).backward()
        nn.utils.clip_grad_norm_(learning, 5.0)
        optimizer.step()
        if falls:
            schedule.step()
    return model
