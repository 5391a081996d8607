"""What an exported detector computes from an image to its final boxes."""

from typing import Any

from torch import Tensor, nn


class Detections(nn.Module):
    """A detector as a function of tensors, for one image.

    Args:
        model: in eval mode.

    Attributes:
        names: of what it returns.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.detector: Any = getattr(model, "roi_heads", model)
        self.transform: Any = model.transform
        has_masks = hasattr(model, "roi_heads") and self.detector.has_mask()
        self.names = ["boxes", "scores", "labels", *(["masks"] if has_masks else [])]

    @property
    def short_side(self) -> int:
        """The shorter side of images after the model has resized them."""
        return int(self.transform.min_size[-1])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """An image `(1, 3, H, W)` in [0, 1] -> boxes `(n, 4)`, XYXY in its pixels, scores and labels `(n,)` and, of a
        model with masks, their probabilities `(n, H, W)`."""
        found = self.model([images[0]])[0]
        if "masks" in found:
            found["masks"] = found["masks"][:, 0]
        return tuple(found[name] for name in self.names)
