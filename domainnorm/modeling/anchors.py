"""Anchors: torchvision's, in float32 or better, and without rounding."""

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
