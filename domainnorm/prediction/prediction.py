"""What a model finds in one image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..errors import one_line
from ..evaluation.coco import coco_results
from ..visualization.draw import draw_objects

MOST_CLASSES = 5  # of a classifier's, the likeliest, that are written


@dataclass(frozen=True, eq=False)
class Prediction:
    """The predictions for one image: the objects of a detector, or a classifier's classes, the likeliest first.

    `len()` is their number, `str()` a line such as `img.jpg: 12 RBC, 1 WBC, 62 ms`.

    Attributes:
        name: the path of the image, or its number among the inputs.
        image: the upright RGB image as given: uint8, or floats in [0, 1].
        scores: of the objects; for a classifier, the probabilities of the classes.
        labels: indices into `class_names`.
        boxes: from a detector, XYXY, in pixels of `image`.
        masks: bool, from a detector with masks.
        seconds: the time that the model took.
        class_names: of the model.

    Shape:
        - image: :math:`(3, H, W)`
        - scores, labels: :math:`(n,)`
        - boxes: :math:`(n, 4)`
        - masks: :math:`(n, H, W)`
    """

    name: str
    image: Tensor
    scores: Tensor
    labels: Tensor
    boxes: Tensor | None
    masks: Tensor | None
    seconds: float
    class_names: Sequence[str]

    @property
    def names(self) -> list[str]:
        """The class name of each label."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        if self.boxes is None:
            found = f"{self.names[0]} {self.scores[0]:.2f}"
        else:
            counts = torch.bincount(self.labels, minlength=len(self.class_names)).tolist()
            found = ", ".join(f"{n} {name}" for n, name in zip(counts, self.class_names, strict=True) if n)
        return f"{one_line(self.name)}: {found or 'nothing'}, {1000 * self.seconds:.0f} ms"

    def draw(self) -> Tensor:
        """Draw the predictions on the image, uint8 (3, H, W); for a classifier the likeliest class."""
        image = F.to_dtype(self.image, torch.uint8, scale=True)
        height, width = image.shape[1:]
        names, scores, boxes = self.names, self.scores, self.boxes
        if boxes is None:
            names, scores, boxes = names[:1], scores[:1], torch.tensor([[0.0, 0.0, width - 1, height - 1]])
        return draw_objects(image, boxes, names, masks=self.masks, scores=scores, classes=self.class_names)

    def coco_results(self, image_id: int) -> list[dict[str, Any]]:
        """Predictions in COCO's results format, with `file_name` and `category_name`; category 1 is the first class.

        Boxes are XYWH and masks RLE. A classifier's results are its likeliest classes, without boxes and masks.
        """
        if self.boxes is None:
            likeliest = zip(self.labels[:MOST_CLASSES].tolist(), self.scores.tolist(), strict=False)
            found = [{"image_id": image_id, "category_id": 1 + label, "score": score} for label, score in likeliest]
        else:
            output = {"boxes": self.boxes, "labels": self.labels, "scores": self.scores}
            if self.masks is not None:
                output["masks"] = self.masks[:, None]
            found = coco_results(image_id, output, range(1, len(self.class_names) + 1))
        return [
            result | {"file_name": self.name, "category_name": name}
            for result, name in zip(found, self.names, strict=False)
        ]
