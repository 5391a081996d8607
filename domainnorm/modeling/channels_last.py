"""The memory format of a detector on a CPU: channels last, in which its convolutions are trained faster."""

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..distributed import world_size


class Transform(GeneralizedRCNNTransform):
    """torchvision's, whose batches for training on a CPU are channels_last; so is then all that is computed of them.

    Not with several processes: gradients of depthwise convolutions would come in another format than the buckets in
    which DDP sends them.
    """

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Images `(3, H, W)` -> `(N, 3, H', W')`, padded by zeros to multiples of `size_divisible`."""
        batch = super().batch_images(images, size_divisible)
        last = self.training and batch.device.type == "cpu" and world_size() == 1
        return batch.contiguous(memory_format=torch.channels_last) if last else batch


class ChannelsLast:
    """A detector whose convolutions can have their weights in channels_last while it trains, as their inputs are.

    In inference the weights are contiguous: a convolution rounds differently otherwise.

    Attributes:
        weights_last: whether a forward arranges them. False at first: not every program takes weights that are not
            contiguous, `torch.nn.utils.parameters_to_vector` for one. `dn.train` sets it on one CPU process.
    """

    weights_last = False
    _are_last = False

    def arrange_weights(self) -> None:
        """As this forward needs them."""
        assert isinstance(self, nn.Module)
        last = self.weights_last and self.training
        if last != self._are_last:
            layout = torch.channels_last if last else torch.contiguous_format
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.data = module.weight.data.contiguous(memory_format=layout)
            self._are_last = last
