"""ResNets for images of 32 pixels."""

from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


class CifarResNet(nn.Module):
    """A ResNet without the stem's strides, of torchvision's blocks and state-dict keys.

    Depth 6n + 2: three stages of n blocks with 16, 32 and 64 channels (*Deep Residual Learning*, §4.2, with
    convolutions in the shortcuts that change the size). Depth 18: four stages of two blocks with 64 to 512 channels,
    as *Four Things* trains on CIFAR-100.

    Args:
        depth: 8, 14, 18, 20, 26, …
        num_classes: of the last layer.
        norm_layer: number of channels -> norm.

    Raises:
        ValueError: there is no network of that depth.
    """

    def __init__(self, depth: int, num_classes: int, norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        if depth != 18 and (depth < 8 or (depth - 2) % 6):
            raise ValueError(f"cifar_resnet takes a depth of 18, or 6n + 2 (8, 14, 20, …), got {depth}")
        widths, blocks = ([64, 128, 256, 512], 2) if depth == 18 else ([16, 32, 64], (depth - 2) // 6)
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = norm_layer(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.stages = [f"layer{i + 1}" for i in range(len(widths))]
        before = widths[0]
        for name, width in zip(self.stages, widths, strict=True):
            stride = 1 if width == before else 2
            shortcut = None
            if stride == 2:
                shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), norm_layer(width))
            first = BasicBlock(before, width, stride, shortcut, norm_layer=norm_layer)
            others = (BasicBlock(width, width, norm_layer=norm_layer) for _ in range(blocks - 1))
            self.add_module(name, nn.Sequential(first, *others))
            before = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images `(N, 3, H, W)` -> logits `(N, num_classes)`."""
        x = self.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(self.avgpool(x).flatten(1))
