"""The memory format of a detector on a CPU: channels last, in which its convolutions are trained faster."""

import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..distributed import world_size


class Transform(GeneralizedRCNNTransform):
    """torchvision's, whose batches for training on a CPU are channels_last; so is then all that is computed of them.

    The weights stay as they are: checkpoints and the optimizer's state know nothing of it. Not with several processes:
    gradients of depthwise convolutions would come in another format than the buckets in which DDP sends them.
    """

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Images `(3, H, W)` -> `(N, 3, H', W')`, padded by zeros to multiples of `size_divisible`."""
        batch = super().batch_images(images, size_divisible)
        last = self.training and batch.device.type == "cpu" and world_size() == 1
        return batch.contiguous(memory_format=torch.channels_last) if last else batch
