"""A backbone's feature maps under a feature pyramid of any number of levels."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock


class Backbone(nn.Module):
    """Images -> maps of all levels, by name, finest first. State-dict keys are torchvision's: `body.…`, `fpn.…`.

    Args:
        body: images -> maps by name, or a list of them.
        positions: of the maps in that list that the pyramid takes.
        channels: of each map that it takes.
        out_channels: of every level.
        extra: the levels above those of the body; None: none.
        norm_layer: after each convolution of the pyramid.
    """

    def __init__(
        self,
        body: nn.Module,
        channels: Sequence[int],
        out_channels: int,
        *,
        positions: Sequence[int] = (),
        extra: ExtraFPNBlock | None = None,
        norm_layer: Callable[..., nn.Module | None] | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.positions = positions
        self.fpn = FeaturePyramidNetwork(list(channels), out_channels, extra_blocks=extra, norm_layer=norm_layer)
        self.out_channels = out_channels

    @property
    def classifier_part(self) -> nn.Module:
        """What has the names of a classifier's weights."""
        model = getattr(self.body, "model", None)  # within what timm puts around it
        return model if isinstance(model, nn.Module) else self.body

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images `(N, 3, H, W)` -> maps `(N, out_channels, H / stride, W / stride)`."""
        maps = self.body(images)
        if isinstance(maps, list):
            maps = OrderedDict((str(k), maps[position]) for k, position in enumerate(self.positions))
        levels: dict[str, Tensor] = self.fpn(maps)
        return levels


class ConvolvedLevels(ExtraFPNBlock):
    """P6, P7, … of RetinaNet, each by a convolution of stride 2: the first of C5, or of P5 as torchvision's v1 has it.

    Args:
        in_channels: of C5; 0: the first is of P5.
        out_channels: of every level.
        number: of levels.
    """

    def __init__(self, in_channels: int, out_channels: int, number: int) -> None:
        super().__init__()
        self.of_body = bool(in_channels)
        self.names = [f"p{6 + k}" for k in range(number)]
        for k, name in enumerate(self.names):
            first = in_channels if k == 0 and in_channels else out_channels
            self.add_module(name, nn.Conv2d(first, out_channels, 3, 2, 1))
        for layer in self.children():
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """The levels and their names, with these after them."""
        x = c[-1] if self.of_body else p[-1]
        for name in self.names:
            x = self.get_submodule(name)(x if name == self.names[0] else F.relu(x))
            p = [*p, x]
        return p, [*names, *self.names]


class SubsampledLevels(ExtraFPNBlock):
    """P6, … of R-CNN: every second place of the level below.

    Args:
        number: of levels.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.names = ["pool", *(f"pool{k}" for k in range(2, number + 1))][:number]

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """The levels and their names, with these after them."""
        for _ in self.names:
            p = [*p, F.max_pool2d(p[-1], kernel_size=1, stride=2)]
        return p, [*names, *self.names]
