"""Small models in which the cases of the audit's study plant their faults."""

import itertools
from collections.abc import Callable
from typing import Any

import audit_training as training
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.regnet import BlockParams, RegNet

import domainnorm as dn

Norm = Callable[[int], nn.Module]


class Plain(nn.Module):
    """Three convolutions, each with its norm, whose blocks may be checkpointed."""

    def __init__(self, width: int = 16, norm: Norm = nn.BatchNorm2d, *, bias: bool = False) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 2 * width]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 1 + (a > 3), 1, bias=bias), norm(b), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        )
        self.linear = nn.Linear(widths[-1], training.CLASSES)
        self.checkpointed: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if k in self.checkpointed and self.training else block(x)
        return self.linear(x.mean((2, 3)))


def residual(norm: Norm = nn.BatchNorm2d) -> nn.Module:
    """torchvision's RegNet, a residual network of groups, with one block in each of three stages."""
    stages = BlockParams([1, 1, 1], [16, 32, 64], [8, 8, 8], [1.0] * 3, [1, 2, 2])
    return RegNet(stages, training.CLASSES, stem_width=16, norm_layer=norm)  # type: ignore[arg-type]


def mobile(norm: Norm = nn.BatchNorm2d) -> nn.Module:
    """torchvision's MobileNetV2 with three stages."""
    stages = [[1, 16, 1, 1], [4, 24, 2, 2], [4, 32, 2, 2]]
    return MobileNetV2(training.CLASSES, 0.5, stages, norm_layer=norm, dropout=0.0)


class Pyramid(nn.Module):
    """A head shared over levels of one image, whose norms are given for each of its two convolutions.

    Args:
        levels: how many.
        norm: `norm(channels)`, once for each convolution: called for every level, with a list if it has domains.
        width: channels.
    """

    def __init__(self, levels: int, norm: Norm, width: int = 16) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(3, width, 3, 1, 1) for _ in range(levels))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in range(2))
        self.norms = nn.ModuleList(norm(width) for _ in range(2))
        self.linear = nn.Linear(width, training.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        xs = [conv(nn.functional.avg_pool2d(x, 2**k) / 2**k) for k, conv in enumerate(self.levels)]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            xs = [conv(x.relu()) for x in xs]
            xs = norm(xs) if isinstance(norm, (dn.DomainBatchNorm, PerLevel)) else [norm(x) for x in xs]
        return self.linear(torch.stack([x.relu().mean((2, 3)) for x in xs]).mean(0))


class PerLevel(nn.ModuleList):
    """A norm for each level."""

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [norm(x) for norm, x in zip(self, xs, strict=True)]


class Regions(nn.Module):
    """A head over crops of the images, as many of each as a batch `(images, counts)` says: RoIs, also none at all."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.GroupNorm(4, width), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.linear = nn.Linear(width, training.CLASSES)

    def forward(self, batch: Any) -> Tensor:
        x, counts = batch if isinstance(batch, tuple) else (batch, [4] * len(batch))
        x = self.body(x)
        side = x.shape[2] // 2
        crops = [x[n, :, k : k + side, k : k + side] for n, count in enumerate(counts) for k in range(count)]
        regions = torch.stack(crops) if crops else x.new_zeros(0, x.shape[1], side, side)
        logits = self.linear(self.head(regions).mean((2, 3)))
        image = torch.repeat_interleave(torch.arange(len(x)), torch.tensor(counts))
        return logits.new_zeros(len(x), training.CLASSES).index_add(0, image, logits)
