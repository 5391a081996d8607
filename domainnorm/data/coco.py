"""A data set in COCO format, checked when it is opened."""

import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ..errors import UserError
from .annotations import ImageRecord, read_annotations
from .catalog import resolve_dataset
from .image import read_image
from .masks import decode_segmentation
from .table import read_json

__all__ = ["CocoDataset", "resolve_dataset"]


class CocoDataset(Dataset[tuple[Any, dict[str, Any]]]):
    """Images and their objects; `dataset[i]` is `(image, target)`.

    The image is a `tv_tensors.Image`, uint8, (3, H, W), RGB. The target has `image_id` and `file_name` as in the
    file, `domain` (the image's "domain" in the file, else ""), `boxes` (`tv_tensors.BoundingBoxes`, (n, 4), float32,
    XYXY), `labels` (int64, (n,), from 0) and, with `masks`, `masks` (`tv_tensors.Mask`, uint8, (n, H, W)). Crowd
    annotations are left out.

    Args:
        name: what `resolve_dataset` takes.
        keep_empty: whether to keep the images without an object.
        invalid_boxes: "error", or "skip" to clip or drop the boxes outside their image or of no area.
        masks: whether to check and decode the segmentations.
        transforms: of `torchvision.transforms.v2`, applied to image and target together.

    Attributes:
        annotation_file, image_folder: paths.
        categories: the file's, sorted by id; label k is the k-th.
        category_ids, class_names: of each label; after `relabel` the id is None if the set has no such category.
        image_ids, sizes: id and (height, width) of each image kept, in the order of the file.

    Raises:
        UserError: what is wrong with the name, the file, an entry or, from `dataset[i]`, an image.
    """

    def __init__(
        self,
        name: str,
        *,
        keep_empty: bool = True,
        invalid_boxes: str = "error",
        masks: bool = False,
        transforms: Callable[..., Any] | None = None,
    ) -> None:
        self.name = name
        self.annotation_file, self.image_folder = resolve_dataset(name)
        self.masks = masks
        self.transforms = transforms
        self.categories, records = read_annotations(self.annotation_file, invalid_boxes=invalid_boxes, masks=masks)
        self.records = [record for record in records if keep_empty or len(record.boxes)]
        self._check_files()
        self.category_ids: list[int | None] = [int(category["id"]) for category in self.categories]
        self.class_names: list[str] = [category["name"] for category in self.categories]
        self.image_ids = [record.image_id for record in self.records]
        self.sizes = [record.size for record in self.records]
        self._merged: dict[int, int] = {}  # the id of a category whose name an earlier one has too -> the earlier one's

    def relabel(self, class_names: list[str], renamed: Mapping[str, str]) -> None:
        """Make labels positions in `class_names`, which has all categories by their names after `renamed`. Once.

        Categories of one name become one, in the ground truth too: the first of them.
        """
        labels: list[int] = []
        ids: dict[str, int] = {}
        for category in self.categories:
            name = renamed.get(category["name"], category["name"])
            labels.append(class_names.index(name))
            self._merged[int(category["id"])] = ids.setdefault(name, int(category["id"]))
        lookup = np.array(labels, dtype=np.int64)
        self.records = [replace(record, labels=lookup[record.labels]) for record in self.records]
        self.category_ids = [ids.get(name) for name in class_names]
        self.class_names = class_names

    def ground_truth(self) -> dict[str, Any]:
        """The contents of the annotation file to evaluate against: without the boxes that were dropped as invalid,
        and with those that reached outside their image clipped; of categories as `relabel` left them.
        """
        data = read_json(self.annotation_file)
        kept = {
            int(id_): box
            for record in self.records
            for id_, box in zip(record.annotation_ids, record.boxes, strict=True)
        }
        annotations = []
        for entry in data["annotations"]:
            entry["category_id"] = self._merged.get(entry["category_id"], entry["category_id"])
            box = kept.get(int(entry["id"]))
            if box is not None:
                x0, y0, x1, y1 = box.tolist()
                clipped = [x0, y0, x1 - x0, y1 - y0]
                if max(abs(a - b) for a, b in zip(clipped, entry["bbox"], strict=True)) > 1:  # less is left as it is
                    entry["bbox"] = clipped
            if box is not None or entry.get("iscrowd", 0):
                annotations.append(entry)
        categories = [
            entry for entry in data["categories"] if self._merged.get(entry["id"], entry["id"]) == entry["id"]
        ]
        return data | {"annotations": annotations, "categories": categories}

    def __len__(self) -> int:
        return len(self.records)

    def _check_files(self) -> None:
        """A missing image shows now, not after days of training; one listing per folder, also over a network."""
        files = [self.image_folder / record.file_name for record in self.records]
        there = {folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in {f.parent for f in files}}
        missing = [file for file in files if file.name not in there[file.parent]]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(
                f"image {missing[0]}: no such file{more}; check the image folder and the file_name in "
                f"{self.annotation_file}"
            )

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        record = self.records[index]
        image = tv_tensors.Image(read_image(self.image_folder / record.file_name, record.size))
        target: dict[str, Any] = {
            "image_id": record.image_id,
            "file_name": record.file_name,
            "domain": record.domain,
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(record.boxes.copy()), format="XYXY", canvas_size=record.size
            ),
            "labels": torch.from_numpy(record.labels.copy()),
        }
        if self.masks:
            target["masks"] = tv_tensors.Mask(torch.from_numpy(self._masks(record)))
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def _masks(self, record: ImageRecord) -> np.ndarray:
        masks = np.zeros((len(record.boxes), *record.size), dtype=np.uint8)
        segmentations = pickle.loads(record.segmentations) if record.segmentations else []
        for mask, segmentation, annotation_id in zip(masks, segmentations, record.annotation_ids, strict=True):
            try:
                mask[:] = decode_segmentation(segmentation, record.size)
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"annotation file {self.annotation_file}: annotation {annotation_id} (image {record.file_name}): "
                    f"its segmentation cannot be decoded ({error}); correct or remove it"
                ) from error
        return masks
