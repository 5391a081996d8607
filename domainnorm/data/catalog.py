"""From the name of a data set to its two paths: annotation file and image folder."""

import difflib
import os
from pathlib import Path

from ..errors import UserError
from ..paths import user_path
from .shapes import SHAPES, shapes_dataset

# Under $DETECTRON2_DATASETS, laid out as detectron2 expects it.
COCO = {
    "coco_2014_train": ("coco/annotations/instances_train2014.json", "coco/train2014"),
    "coco_2014_val": ("coco/annotations/instances_val2014.json", "coco/val2014"),
    "coco_2014_minival": ("coco/annotations/instances_minival2014.json", "coco/val2014"),
    "coco_2014_valminusminival": ("coco/annotations/instances_valminusminival2014.json", "coco/val2014"),
    "coco_2017_train": ("coco/annotations/instances_train2017.json", "coco/train2017"),
    "coco_2017_val": ("coco/annotations/instances_val2017.json", "coco/val2017"),
}


def datasets_root() -> Path:
    """The folder that holds `coco/`: `$DETECTRON2_DATASETS`, else `datasets`."""
    return user_path(os.environ.get("DETECTRON2_DATASETS") or "datasets")


def resolve_dataset(name: str) -> tuple[Path, Path]:
    """The annotation file and the image folder of a data set.

    `name` is a known name (`shapes_train`, `coco_2017_val`, …) or two paths, `"annotations.json:image_folder"`.
    The shapes sets are generated on first use. Whether the other paths exist is not checked here.

    Raises:
        UserError: the name is neither.
    """
    if name in SHAPES:
        return shapes_dataset(name)
    if name in COCO:
        annotation_file, image_folder = COCO[name]
        return datasets_root() / annotation_file, datasets_root() / image_folder
    file, _, folder = str(name).rpartition(":")
    if file and folder:
        return user_path(file), user_path(folder)
    nearest = difflib.get_close_matches(str(name), [*SHAPES, *COCO], n=3, cutoff=0.0)
    raise UserError(
        f"unknown data set {name!r}: the nearest known names are {', '.join(nearest)}; "
        'for your own data give two paths, "annotations.json:image_folder"'
    )
