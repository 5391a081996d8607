"""The built-in data set, generated on first use: simple shapes in three looks, in COCO format."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from ..errors import UserError
from .scene import CLASSES, LOOKS, draw_scene

VERSION = 1  # to be raised when the pixels or annotations change: the sets are cached under this number
COUNTS = {"train": 1000, "val": 200}  # images

# name -> (look, split); the day look is the plain "shapes"
SHAPES = {
    f"shapes_{split}" if look == "day" else f"shapes_{look}_{split}": (look, split)
    for look in LOOKS
    for split in COUNTS
}


def shapes_root() -> Path:
    """Where the sets are kept: `$DOMAINNORM_DATA`, else `~/.cache/domainnorm`."""
    return Path(os.environ.get("DOMAINNORM_DATA") or "~/.cache/domainnorm").expanduser()


def shapes_dataset(name: str, count: int | None = None) -> tuple[Path, Path]:
    """The annotation file and image folder of the set `name` (a key of `SHAPES`), generated if they are not there.

    A set appears in one step, by renaming a finished folder: a process that is killed leaves no half of one, and of
    several that generate it at once the first to finish wins.

    Args:
        count: images; by default `COUNTS`. Other counts are cached apart.

    Raises:
        UserError: the folder cannot be written.
    """
    look, split = SHAPES[name]
    count = COUNTS[split] if count is None else count
    folder = shapes_root() / f"shapes-v{VERSION}" / (name if count == COUNTS[split] else f"{name}-{count}")
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _generate(folder, look, split, count)
        except OSError as error:
            raise UserError(
                f"data set {name}: cannot be written to {folder} ({error.strerror}); "
                "set DOMAINNORM_DATA to a folder that can"
            ) from error
    return folder / "annotations.json", folder / "images"


def _generate(folder: Path, look: str, split: str, count: int) -> None:
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(draft, look, split, count)
        draft.chmod(0o755)  # mkdtemp's folders are for their owner only; the cache may be shared
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, and its set is equal
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(folder: Path, look: str, split: str, count: int) -> None:
    (folder / "images").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        # A stream for each image: a set of fewer images is the beginning of a longer one.
        rng = np.random.default_rng([list(LOOKS).index(look), list(COUNTS).index(split), image_id])
        scene = draw_scene(LOOKS[look], rng)
        file_name = f"{image_id:06}.png"
        Image.fromarray(scene.image).save(folder / "images" / file_name, compress_level=1)
        height, width = scene.image.shape[:2]
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width, "domain": look})
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "area": int(coco_mask.area(rle)),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
                }
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    contents = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(contents), encoding="utf-8")
