"""Anchors: torchvision's, in float32 or better, and without rounding; how well they fit boxes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection import anchor_utils


class AnchorGenerator(anchor_utils.AnchorGenerator):
    """torchvision's; where the features are of half precision, which would move anchors by pixels, in float32."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)


class ExactAnchorGenerator(AnchorGenerator):
    """The same, without rounding the sides to whole pixels: detectron2's anchors."""

    def generate_anchors(
        self,
        scales: list[float],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Boxes `(len(aspect_ratios) · len(scales), 4)` around 0, ratio by ratio."""
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        widths, heights = (sizes / roots).flatten(), (sizes * roots).flatten()
        return torch.stack([-widths, -heights, widths, heights], 1) / 2


@torch.no_grad()
def best_ious(boxes: Tensor, sizes: Tensor, generator: anchor_utils.AnchorGenerator, strides: Sequence[int]) -> Tensor:
    """The largest IoU of each box with any anchor of its image, as if that were alone in its batch.

    Args:
        boxes: XYXY in pixels, float32 (n, 4).
        sizes: (height, width) of the image of each, int64 (n, 2).
        generator: with an anchor size for each pyramid level.
        strides: of the levels; sides of images are padded to multiples of 32.

    Returns:
        float32 (n,).
    """
    best = boxes.new_zeros(len(boxes))
    sides = boxes[:, 2:] - boxes[:, :2]
    centers, padded = (boxes[:, 2:] + boxes[:, :2]) / 2, (sizes + -sizes % 32).flip(1)
    area = sides.prod(1)
    for stride, cells in zip(strides, generator.cell_anchors, strict=True):
        # Of all places on a grid, the nearest to the center of a box has the largest overlap in x, and in y.
        places = (padded + stride - 1) // stride
        steps = padded // places  # as torchvision has it
        nearest = ((centers / steps).round().clamp(min=0).minimum(places - 1) * steps).to(boxes.dtype)
        low, high = boxes[:, :2] - nearest, boxes[:, 2:] - nearest
        for anchor in cells.to(boxes):
            overlap = (high.minimum(anchor[2:]) - low.maximum(anchor[:2])).clamp_(min=0).prod(1)
            union = area + (anchor[2:] - anchor[:2]).prod() - overlap
            torch.maximum(best, overlap.div_(union), out=best)
    return best
