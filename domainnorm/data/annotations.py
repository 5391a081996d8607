"""The annotations of a data set as it is used: what is left out, by which rule, and how much of it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..distributed import rank
from ..errors import UserError
from .boxes import are_corners, are_relative, clip_boxes, under_a_pixel
from .columns import Columns, read_columns
from .masks import MISSING

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageRecord:
    """What is known of one image before it is read; its objects are in the order of the file."""

    image_id: int
    file_name: str
    domain: str  # "" if the file names none
    size: tuple[int, int]  # height, width
    boxes: np.ndarray  # (n, 4) float32, XYXY, inside the image, of positive area
    labels: np.ndarray  # (n,) int64, positions in the list of categories
    annotation_ids: np.ndarray  # (n,) int64
    rows: np.ndarray  # (n,) int64, where in the columns of the file the objects are


class Annotations(Sequence[ImageRecord]):
    """The images of a data set that are kept, and their objects: what it says of each image is an `ImageRecord`.

    Crowds are left out: no model is trained on them, and evaluation alone knows them. A box up to a pixel beyond its
    image is clipped. What is further beyond or has no area is an error, or with `invalid_boxes="skip"` clipped and, if
    no area is left, dropped; with `masks`, so is an object whose segmentation cannot be used. What is left out or
    changed is counted, and logged in one line.

    Args:
        columns: of the annotation file, with segmentations if `masks`.
        keep_empty: whether to keep the images without an object.
        invalid_boxes: "error" or "skip".
        masks: whether masks are needed.
        trained_at: the shorter sides and the largest longer side that images are resized to; objects that are under a
            pixel at all of them are left out. None: they are kept.

    Attributes:
        boxes: of all objects of the file, within their image: XYXY, float32 (m, 4).
        labels: of all objects: int64 (m,).
        kept: which objects are used: bool (m,).
        images: positions in the columns of the images that are kept.
        counts: what was left out or changed, by its rule.

    Raises:
        UserError: what is invalid; objects of which none is left.
    """

    def __init__(
        self,
        columns: Columns,
        *,
        keep_empty: bool = True,
        invalid_boxes: str = "error",
        masks: bool = False,
        trained_at: tuple[Sequence[int], int] | None = None,
    ) -> None:
        self.columns = columns
        self.labels = columns.labels
        sizes, objects = columns.sizes[columns.images], ~columns.crowds
        self.boxes, beyond, empty = clip_boxes(columns.xywh, sizes)
        if are_corners(columns.xywh[objects], sizes[objects]):
            raise UserError(
                f"{columns.source}: most of its {objects.sum()} boxes reach outside of their image, unless they are "
                "x1, y1, x2 and y2; expected COCO's x, y, width and height: write x2 - x1 and y2 - y1"
            )
        invalid = objects & (beyond | empty)
        if invalid.any() and invalid_boxes == "error":
            row = int(invalid.argmax())
            what = "reaches outside the image" if beyond[row] else "has no area in the image"
            others = f" ({invalid.sum() - 1} more boxes are invalid)" if invalid.sum() > 1 else ""
            raise self._refusal(row, f"its box {columns.xywh[row].tolist()} (x, y, width, height) {what}{others}")
        self.unusable = self._unusable_masks(invalid_boxes) if masks else {}
        dropped = objects & empty
        dropped[list(self.unusable)] |= objects[list(self.unusable)]
        self.kept = objects & ~dropped
        if are_relative(self.boxes[self.kept], sizes[self.kept]):
            raise UserError(
                f"{columns.source}: all its {self.kept.sum()} boxes lie between 0 and 1, as shares of the image; "
                "expected COCO's x, y, width and height in pixels: multiply them by the images' width and height"
            )
        counts = {
            "boxes clipped to their image": int((self.kept & beyond).sum()),
            "objects dropped as invalid": int(dropped.sum()),
        }
        if trained_at is None:
            sides = self.boxes[self.kept, 2:] - self.boxes[self.kept, :2]
            counts["boxes under a pixel"] = int((sides < 1).any(axis=1).sum())
        else:
            always, sometimes = (small & self.kept for small in under_a_pixel(self.boxes, sizes, *trained_at))
            self.kept &= ~always
            counts["objects left out as under a pixel at every size of INPUT.MIN_SIZE_TRAIN"] = int(always.sum())
            counts["under a pixel at some"] = int((sometimes & ~always).sum())
        if objects.any() and not self.kept.any():
            raise UserError(
                f"{columns.source}: none of its {objects.sum()} objects is left to use: {listed(counts)}; correct the "
                "boxes, which COCO has as x, y, width and height in pixels"
            )
        self._index(keep_empty)
        counts["objects that are there twice (image, category and box)"] = self._duplicates()
        counts["images that are listed twice"] = len(columns.file_names) - len(set(columns.file_names))
        usual = {
            "crowds left out of training": int(columns.crowds.sum()),
            "crowds without a mask, whose box is taken": sum(bool(columns.crowds[row]) for row in self.unusable),
            "images without an object left out": len(columns.image_ids) - len(self.images),
        }
        self.counts = counts | usual
        if rank() == 0 and any(self.counts.values()):
            logger.log(
                logging.WARNING if any(counts.values()) else logging.INFO,
                "%s: %d images, %d objects; %s",
                columns.source,
                len(self.images),
                self.kept.sum(),
                listed(self.counts),
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        image = int(self.images[index])
        rows = self._rows[self._ends[image - 1] if image else 0 : self._ends[image]]
        columns = self.columns
        return ImageRecord(
            image_id=int(columns.image_ids[image]),
            file_name=columns.file_names[image],
            domain=columns.domains[image],
            size=columns.size(image),
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            annotation_ids=columns.ids[rows],
            rows=rows,
        )

    @property
    def file_names(self) -> Sequence[str]:
        """The file names of the images that are kept."""
        return self.columns.file_names.at(self.images)

    def ground_truth(self) -> dict[str, Any]:
        """What predictions are evaluated against, in COCO's format: the objects that are used, and the crowds.

        Boxes that reached outside of their image are clipped; of less than a pixel, they are left as they are.
        """
        columns = self.columns
        clipped = self.boxes.astype(np.float64)
        clipped[:, 2:] -= clipped[:, :2]
        changed = ~(np.abs(clipped - columns.xywh).max(axis=1, initial=0) <= 1)  # also where there is a NaN
        boxes = np.where(changed[:, None], clipped, columns.xywh)
        annotations = []
        for row in np.flatnonzero(self.kept | columns.crowds).tolist():
            image = int(columns.images[row])
            entry = {
                "id": int(columns.ids[row]),
                "image_id": int(columns.image_ids[image]),
                "category_id": columns.categories[columns.labels[row]]["id"],
                "bbox": boxes[row].tolist(),
            }
            if columns.crowds[row]:
                entry["iscrowd"] = 1
            if not np.isnan(columns.areas[row]):
                entry["area"] = float(columns.areas[row])
            if columns.segmentations is not None and row not in self.unusable:
                entry["segmentation"] = columns.segmentations.coco(row, columns.size(image))
            annotations.append(entry)
        images = [
            {"id": id_, "file_name": name, "height": height, "width": width}
            for id_, name, (height, width) in zip(
                columns.image_ids.tolist(), columns.file_names, columns.sizes.tolist(), strict=True
            )
        ]
        return {"images": images, "annotations": annotations, "categories": columns.categories}

    def _index(self, keep_empty: bool) -> None:
        """Which objects are in which image, and which images are kept."""
        of_images, count = self.columns.images, len(self.columns.image_ids)
        rows = np.flatnonzero(self.kept)
        self._rows = rows[np.argsort(of_images[rows], kind="stable")]
        numbers = np.bincount(of_images[rows], minlength=count)
        self._ends = np.cumsum(numbers)
        self.images = np.arange(count) if keep_empty else np.flatnonzero(numbers)

    def _duplicates(self) -> int:
        columns = self.columns
        keys = [columns.images, columns.labels, *columns.xywh.view(np.uint64).T]
        hashes = np.zeros(int(self.kept.sum()), dtype=np.uint64)
        for key in keys:  # FNV's way: faster than sorting rows
            hashes = (hashes ^ key[self.kept].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            hashes ^= hashes >> np.uint64(29)
        return len(hashes) - len(np.unique(hashes))

    def _unusable_masks(self, invalid_boxes: str) -> dict[int, str]:
        """What is wrong with the segmentation of the objects, also crowds, whose segmentation is not usable."""
        columns = self.columns
        assert columns.segmentations is not None
        found = columns.segmentations.unusable(columns.sizes[columns.images])
        if found and len(found) == len(columns.ids) and set(found.values()) == {MISSING}:
            raise UserError(
                f"{columns.source}: none of its {len(found)} objects has a segmentation, which masks need; name "
                "another data set, or set MODEL.MASK_ON False"
            )
        rows = sorted(row for row in found if not columns.crowds[row])
        if rows and invalid_boxes == "error":
            raise self._refusal(rows[0], f"its segmentation {found[rows[0]]}")
        return found

    def _refusal(self, row: int, what: str) -> UserError:
        columns, image = self.columns, int(self.columns.images[row])
        height, width = columns.size(image)
        return UserError(
            f"{columns.source}: annotation {columns.ids[row]} (image {columns.file_names[image]}, {width} x "
            f"{height} pixels): {what}; correct it, or set DATALOADER.INVALID_BOXES skip to clip or drop "
            "what is invalid"
        )


def read_annotations(file: Path, *, masks: bool = False, **options: Any) -> Annotations:
    """The `Annotations` of a file, with their `options`.

    Raises:
        UserError: missing or broken file or entry, and what `Annotations` refuses.
    """
    return Annotations(read_columns(file, masks=masks), masks=masks, **options)


def listed(counts: Mapping[str, int]) -> str:
    """Those that are not 0, in words."""
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)
