"""From a data set as a config gives it to its name and its two paths: annotation file and image folder."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError, quote
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

VALIDATION = "@validation"  # the end of what a classifier's training set holds out


def split_name(entry: str) -> tuple[str, str]:
    """The name of a data set, as tables and results have it, and where it is.

    Of `"NAME=annotations.json:images"` (or `"NAME=shapes_val"`, `"NAME=folder"`) NAME, and what is behind it; of
    another entry both are the entry, also of paths with a "=" of their own: NAME has no "/", ":" or "~", and a file or
    folder that is there is a path.
    """
    entry = str(entry)
    name, _, location = entry.partition("=")
    file = entry.rpartition(":")[0] or entry
    if not name.strip() or not location or set("/:~") & set(name) or os.path.exists(user_path(file)):
        return entry, entry
    return name.strip() + (VALIDATION if location.endswith(VALIDATION) else ""), location


def by_name(entries: Sequence[str]) -> dict[str, str]:
    """The entries of `DATASETS.TEST` by the names of their data sets.

    Raises:
        UserError: two data sets have one name.
    """
    found: dict[str, str] = {}
    for entry in entries:
        name = split_name(entry)[0]
        if found.setdefault(name, entry) != entry:
            raise UserError(f"DATASETS.TEST: {quote(found[name])} and {quote(entry)} have one name; give them two")
    return found


def datasets_root() -> Path:
    """The folder that holds `coco/`: `$DETECTRON2_DATASETS`, else `datasets`."""
    return user_path(os.environ.get("DETECTRON2_DATASETS") or "datasets")


def resolve_dataset(name: str) -> tuple[Path, Path]:
    """The annotation file and the image folder of a data set.

    `name` is a known name (`shapes_train`, `coco_2017_val`, …) or two paths, `"annotations.json:image_folder"`; either
    may have a name of its own before it, `"NAME=annotations.json:image_folder"`.
    The shapes sets are generated on first use. Whether the other paths exist is not checked here.

    Raises:
        UserError: the name is neither.
    """
    _, name = split_name(name)
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
