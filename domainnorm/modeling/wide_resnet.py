"""Wide ResNets for images of 32 pixels, and a network of linear layers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


class WideResNet(nn.Module):
    """A Wide ResNet of depth 6n + 4: three stages of n blocks with 16, 32 and 64 times `width` channels.

    Zagoruyko & Komodakis (2016), as *Ghost Normalization* (28, 10) and *BGN* (10, 2) train it on CIFAR: norm and ReLU
    come before a convolution.

    Args:
        depth: 10, 16, 22, 28, …
        width: factor of the channels.
        num_classes: of the last layer.
        norm_layer: number of channels -> norm.

    Raises:
        ValueError: there is no network of that depth or width.
    """

    def __init__(self, depth: int, width: int, num_classes: int, norm_layer: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(f"it takes a depth of 6n + 4 (10, 16, 22, 28, …) and a width, got {depth} and {width}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        before = 16
        for stage in range(3):
            channels = (16 << stage) * width
            blocks: list[nn.Module] = []
            for _ in range((depth - 4) // 6):
                blocks.append(_WideBlock(before, channels, 2 if stage and not blocks else 1, norm_layer))
                before = channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.bn1 = norm_layer(before)
        self.fc = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images `(N, 3, H, W)` -> logits `(N, num_classes)`."""
        x = self.conv1(x)
        for stage in range(3):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(self.bn1(x).relu().mean((2, 3)))


class _WideBlock(nn.Module):
    """Norm, ReLU and convolution, twice; a 1 × 1 convolution in the shortcut where the channels change."""

    def __init__(self, before: int, channels: int, stride: int, norm_layer: Norm) -> None:
        super().__init__()
        self.bn1 = norm_layer(before)
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.bn2 = norm_layer(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(before, channels, 1, stride, bias=False) if before != channels else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(x).relu()
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(self.bn2(self.conv1(y)).relu())


class SimpleNet(nn.Sequential):
    """Linear layers with norm and ReLU over the grey pixels (*Ghost Normalization*, §3.1: 512 and 300 for MNIST).

    Args:
        pixels: of an image.
        widths: of the layers before the last one.
        num_classes: of the last layer.
        norm_layer: number of features -> norm.
    """

    def __init__(self, pixels: int, widths: list[int], num_classes: int, norm_layer: Norm = nn.BatchNorm1d) -> None:
        layers: list[nn.Module] = []
        for before, width in zip([pixels, *widths], widths, strict=False):
            layers += [nn.Linear(before, width), norm_layer(width), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Linear(widths[-1] if widths else pixels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Images `(N, 3, H, W)` of equal channels -> logits `(N, num_classes)`."""
        return super().forward(torch.flatten(x.mean(1), 1))
