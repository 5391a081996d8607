"""A data set whose masks are half of their boxes, a config to train on it and a model that finds all of it."""

import json

import numpy as np
import tiny
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

HEIGHT, WIDTH = 48, 64
SQUARES = [[(2, 4, 16), (30, 10, 24)], [], [(20, 8, 40)]]  # x, y, side: the objects of each image


def triangle(x, y, side):
    """The lower left half of a square, which is its box: (H, W)."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[y : y + side, x : x + side] = np.tri(side)
    return mask


def rle(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def write(folder, squares=SQUARES, segmentation=lambda *square: rle(triangle(*square))):
    """Images whose objects are bright in green, and whose red says which image it is; returns the data set's name."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i, objects in enumerate(squares):
        pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
        pixels[..., 0] = i
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH})
        for x, y, side in objects:
            pixels[..., 1] |= 255 * triangle(x, y, side)
            entry = {"id": len(annotations), "image_id": 10 + i, "category_id": 3, "bbox": [x, y, side, side]}
            annotations.append(entry | {"segmentation": segmentation(x, y, side)})
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "triangle"}]}
    (folder / "annotations.json").write_text(json.dumps(content))
    return f"{folder / 'annotations.json'}:{folder / 'images'}"


def config(name, folder, **others):
    sizes = {"INPUT__MIN_SIZE_TRAIN": [HEIGHT], "INPUT__MAX_SIZE_TRAIN": 1000}
    return tiny.config(name, folder, **(tiny.MASK_RCNN | sizes | others))


class Oracle(nn.Module):
    """Finds the objects of `SQUARES` with certainty, and whatever `paint` makes of their masks."""

    def __init__(self, paint=lambda masks: masks):
        super().__init__()
        self.paint = paint

    def forward(self, images):
        outputs = []
        for image in images:
            squares = SQUARES[round(image[0, 0, 0].item() * 255)]
            masks = torch.zeros(len(squares), 1, *image.shape[1:])
            for mask, square in zip(masks, squares, strict=True):
                mask[0] = torch.from_numpy(triangle(*square))
            outputs.append(
                {
                    "boxes": torch.tensor([[x, y, x + s, y + s] for x, y, s in squares]).reshape(-1, 4),
                    "labels": torch.zeros(len(squares), dtype=torch.int64),
                    "scores": torch.ones(len(squares)),
                    "masks": self.paint(masks),
                }
            )
        return outputs
