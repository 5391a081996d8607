"""The memory format of a detector on a CPU: channels last, in which its convolutions are faster."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx.operators import shape_as_tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..distributed import world_size


def runs_last(training: bool) -> bool:
    """Whether a forward pass on a CPU is in channels_last: in training, and in half precision.

    In inference in float32 it is not: convolutions would round otherwise than in torchvision's models. Nor with
    several processes: gradients of depthwise convolutions would come in another format than the buckets in which DDP
    sends them.
    """
    return (training or torch.is_autocast_enabled("cpu")) and world_size() == 1


class Transform(GeneralizedRCNNTransform):
    """torchvision's, whose batches are channels_last where `runs_last`; so is then all that is computed of them.

    An image that is so narrow that a side would become 0 keeps one pixel there.

    Attributes:
        always_last: whether batches are channels_last in any case.
    """

    always_last = False

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """An image `(3, H, W)` in the size of inference; in training as it is."""
        if torch.jit.is_tracing() and not self.training:
            return self._resize_traced(image), target
        short, long = sorted(image.shape[-2:])
        if not self.training and short * self.max_size < long:  # the longer side is what limits it
            size = [max(self.max_size * side // long, 1) for side in image.shape[-2:]]
            return nn.functional.interpolate(image[None], size, mode="bilinear", align_corners=False)[0], target
        return super().resize(image, target)

    def _resize_traced(self, image: Tensor) -> Tensor:
        """The same as operations: torchvision's are in single precision, with which sides differ by a pixel."""
        sides = shape_as_tensor(image)[-2:].double()
        goals = torch.tensor([self.min_size[-1], self.max_size], dtype=torch.float64)
        scale = (goals / torch.stack([sides.min(), sides.max()])).min()
        height, width = (sides * scale).floor().clamp(min=1).long().unbind()
        size: Any = (height, width)
        return nn.functional.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Images `(3, H, W)` -> `(N, 3, H', W')`, padded by zeros to multiples of `size_divisible`."""
        batch = super().batch_images(images, size_divisible)
        last = self.always_last or (batch.device.type == "cpu" and runs_last(self.training))
        return batch.contiguous(memory_format=torch.channels_last) if last else batch


class ChannelsLast:
    """A detector whose convolutions can have their weights in channels_last where `runs_last`, as their inputs are.

    Attributes:
        always_last: whether weights are channels_last in any case, as those of `Transform` are.
        weights_last: whether a forward arranges them. False at first: not every program takes weights that are not
            contiguous, `torch.nn.utils.parameters_to_vector` for one. `dn.train` sets it on one CPU process.
    """

    weights_last = False
    always_last = False

    def arrange_weights(self) -> None:
        """As this forward needs them."""
        assert isinstance(self, nn.Module)
        last = self.always_last or (self.weights_last and runs_last(self.training))
        layout = torch.channels_last if last else torch.contiguous_format
        with torch.inference_mode(False):  # what an inference makes, training is to use
            for module in self.modules():
                if isinstance(module, nn.Conv2d) and not module.weight.is_contiguous(memory_format=layout):
                    module.weight.data = module.weight.data.contiguous(memory_format=layout)
