"""The built-in data sets, generated on first use, in COCO format: simple shapes in three looks, and herds of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from .cache import cache_root, cached
from .scene import CLASSES, LAYOUTS, LOOKS, draw_scene

VERSION = 1  # to be raised when the pixels or annotations change: the sets are cached under this number
COUNTS = {"train": 1000, "val": 200}  # images

# name -> (layout, look, split); the day look is the plain "shapes"
SHAPES = {
    f"shapes_{split}" if look == "day" else f"shapes_{look}_{split}": ("shapes", look, split)
    for look in LOOKS
    for split in COUNTS
}
SHAPES |= {f"herds_{split}": ("herds", "day", split) for split in COUNTS}


def shapes_dataset(name: str, count: int | None = None) -> tuple[Path, Path]:
    """The annotation file and image folder of the set `name` (a key of `SHAPES`), generated if they are not there.

    Args:
        count: images; by default `COUNTS`. Other counts are cached apart.

    Raises:
        UserError: the folder cannot be written.
    """
    layout, look, split = SHAPES[name]
    count = COUNTS[split] if count is None else count
    folder = cache_root() / f"{layout}-v{VERSION}" / (name if count == COUNTS[split] else f"{name}-{count}")
    cached(name, folder, lambda draft: _write(draft, layout, look, split, count))
    return folder / "annotations.json", folder / "images"


def _write(folder: Path, layout: str, look: str, split: str, count: int) -> None:
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        # A stream for each image: a set of fewer images is the beginning of a longer one.
        stream = [list(LOOKS).index(look), list(COUNTS).index(split), image_id]
        if layout != "shapes":  # with its own number, since the sets of the first layout are as they are
            stream.append(list(LAYOUTS).index(layout))
        scene = draw_scene(LOOKS[look], np.random.default_rng(stream), LAYOUTS[layout])
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
