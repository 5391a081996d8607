"""A data set in COCO format, checked when it is opened."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ..errors import UserError
from .annotations import Annotations, ImageRecord, read_annotations
from .catalog import resolve_dataset
from .image import IntensityRange, read_image

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
        trained_at: the shorter sides and the largest longer side that images are resized to: objects that are under a
            pixel at all of them are left out. None: they are kept.
        max_intensity: of white in images of more than 8 bits; 0: as `IntensityRange` finds it.
        transforms: of `torchvision.transforms.v2`, applied to image and target together.

    Attributes:
        annotation_file, image_folder: paths.
        records: what is known of each image; see `Annotations`.
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
        trained_at: tuple[Sequence[int], int] | None = None,
        max_intensity: float = 0.0,
        transforms: Callable[..., Any] | None = None,
    ) -> None:
        self.name = name
        self.annotation_file, self.image_folder = resolve_dataset(name)
        self.masks = masks
        self.transforms = transforms
        self.records: Annotations = read_annotations(
            self.annotation_file,
            keep_empty=keep_empty,
            invalid_boxes=invalid_boxes,
            masks=masks,
            trained_at=trained_at,
        )
        self.intensities = IntensityRange(self.image_folder, self.records.file_names, max_intensity)
        self._check_files()
        self.categories = self.records.columns.categories
        self.category_ids: list[int | None] = [category["id"] for category in self.categories]
        self.class_names: list[str] = [category["name"] for category in self.categories]
        self.image_ids: list[int] = self.records.columns.image_ids[self.records.images].tolist()
        self._merged: dict[int, int] = {}  # the id of a category whose name an earlier one has too -> the earlier one's

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image kept."""
        return [(height, width) for height, width in self.records.columns.sizes[self.records.images].tolist()]

    def relabel(self, class_names: list[str], renamed: Mapping[str, str]) -> None:
        """Make labels positions in `class_names`, which has all categories by their names after `renamed`. Once.

        Categories of one name become one, in the ground truth too: the first of them.
        """
        labels: list[int] = []
        ids: dict[str, int] = {}
        for category in self.categories:
            name = renamed.get(category["name"], category["name"])
            labels.append(class_names.index(name))
            self._merged[category["id"]] = ids.setdefault(name, category["id"])
        self.records.labels = np.array(labels, dtype=np.int64)[self.records.labels]
        self.category_ids = [ids.get(name) for name in class_names]
        self.class_names = class_names

    def ground_truth(self) -> dict[str, Any]:
        """What predictions are evaluated against, in COCO's format: the objects that are used, and the crowds.

        Boxes that reached outside of their image are clipped; categories are as `relabel` left them.
        """
        truth = self.records.ground_truth()
        for entry in truth["annotations"]:
            entry["category_id"] = self._merged.get(entry["category_id"], entry["category_id"])
        categories = [entry for entry in self.categories if self._merged.get(entry["id"], entry["id"]) == entry["id"]]
        return truth | {"categories": categories}

    def __len__(self) -> int:
        return len(self.records)

    def _check_files(self) -> None:
        """A missing image shows now, not after days of training; one listing per folder, also over a network."""
        there: dict[Path, dict[str, os.DirEntry[str]]] = {}
        problem, number = "", 0
        for name in self.records.file_names:
            file = self.image_folder / name
            if file.parent not in there:
                there[file.parent] = _entries(file.parent)
            entry = there[file.parent].get(file.name)
            if entry is None or not entry.is_file():
                number += 1
                missing = "no such file" if entry is None else "it is no file"
                problem = problem or f"image {file}: {missing}"
        if problem:
            more = f" (and {number - 1} more)" if number > 1 else ""
            raise UserError(f"{problem}{more}; check the image folder and the file_name in {self.annotation_file}")

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        record = self.records[index]
        pixels = read_image(self.image_folder / record.file_name, record.size, self.intensities)
        target: dict[str, Any] = {
            "image_id": record.image_id,
            "file_name": record.file_name,
            "domain": record.domain,
            "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(record.boxes), format="XYXY", canvas_size=record.size),
            "labels": torch.from_numpy(record.labels),
        }
        if self.masks:
            target["masks"] = tv_tensors.Mask(torch.from_numpy(self._masks(record)))
        image = tv_tensors.Image(pixels)
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def _masks(self, record: ImageRecord) -> np.ndarray:
        masks = np.zeros((len(record.boxes), *record.size), dtype=np.uint8)
        segmentations = self.records.columns.segmentations
        assert segmentations is not None
        for mask, row in zip(masks, record.rows.tolist(), strict=True):
            mask[:] = segmentations.mask(row, record.size)
        return masks


def _entries(folder: Path) -> dict[str, "os.DirEntry[str]"]:
    """What is in a folder, by name; nothing if it is none."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry for entry in entries}
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of a name with a zero byte
        return {}
    except OSError as error:
        raise UserError(f"image folder {folder}: cannot be read ({error.strerror}); check its permissions") from error
