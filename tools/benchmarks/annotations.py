"""Time and memory for opening a large COCO file: by domainnorm, with its checks, and by pycocotools.

The file is synthetic, with the proportions of COCO's `instances_train2017.json`: 7.3 objects per image, each with a
polygon. Each way runs in its own process; time is its CPU time, memory the peak above what it held before.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

from domainnorm.data.annotations import read_annotations

from .evaluation import CATEGORIES, HEIGHT, WIDTH
from .fresh import in_fresh_process, peak_of
from .table import Row
from .timing import ratio

OBJECTS = 7.3  # an image, on average
WAYS = {"boxes": "bbox", "boxes and masks": "segm"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--repeats", type=int, default=3, help="number of timings, of which the median is taken")


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Without the segmentations, and with them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "annotations.json"
        objects = write_file(file, args.images)
        ways = ("plain", *WAYS)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        peaks: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way in ways:
                found, taken, peak = in_fresh_process(opened, way, file)
                assert found == (args.images, objects)
                seconds[way].append(taken)
                peaks[way].append(peak)
        for way, kind in WAYS.items():
            yield {
                "kind": kind,
                "images": args.images,
                "objects": objects,
                "MB of the file": file.stat().st_size / 1e6,
                "time, ours / plain": ratio(seconds, way, "plain"),
                "memory, ours / plain": ratio(peaks, way, "plain"),
                "s, ours": statistics.median(seconds[way]),
                "s, plain": statistics.median(seconds["plain"]),
                "MB, ours": statistics.median(peaks[way]),
                "MB, plain": statistics.median(peaks["plain"]),
            }


def opened(way: str, file: Path) -> tuple[tuple[int, int], float, float]:
    """In a process of its own: numbers of images and objects, CPU seconds, and megabytes at the peak."""
    began = time.process_time()
    found, peak = peak_of(lambda: plain(file) if way == "plain" else ours(file, masks=way != "boxes"))
    return found, time.process_time() - began, peak


def ours(file: Path, masks: bool) -> tuple[int, int]:
    annotations = read_annotations(file, masks=masks)
    return len(annotations), int(annotations.kept.sum())


def plain(file: Path) -> tuple[int, int]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(file))
    return len(coco.imgs), len(coco.anns)


def write_file(file: Path, images: int, seed: int = 0) -> int:
    """The number of objects. As `json.dump` writes them, a line at a time."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(OBJECTS, images)
    total = int(counts.sum())
    with open(file, "w", encoding="utf-8") as stream:
        stream.write('{"info": {"description": "made up"}, "licenses": [], "images": [')
        for image in range(images):
            entry = {"license": 3, "file_name": f"{image:012d}.jpg", "height": HEIGHT, "width": WIDTH, "id": image}
            entry["coco_url"] = entry["flickr_url"] = f"http://images.example.org/{image:012d}.jpg"
            stream.write(f"{', ' * (image > 0)}{json.dumps(entry)}")
        stream.write('], "annotations": [')
        for number, image in enumerate(np.repeat(np.arange(images), counts).tolist()):
            points = rng.integers(4, 40)
            corner, size = rng.random(2) * (WIDTH / 2, HEIGHT / 2), 10 + rng.random(2) * 200
            polygon = (corner + rng.random((points, 2)) * size).round(2)
            low, high = polygon.min(axis=0), polygon.max(axis=0)
            entry = {"segmentation": [polygon.ravel().tolist()], "area": round(float(size.prod() / 2), 4), "iscrowd": 0}
            entry |= {"image_id": image, "bbox": [*low.tolist(), *(high - low).round(2).tolist()]}
            entry |= {"category_id": int(rng.integers(1, CATEGORIES + 1)), "id": number + 1}
            stream.write(f"{', ' * (number > 0)}{json.dumps(entry)}")
        categories = [{"supercategory": "thing", "id": k, "name": str(k)} for k in range(1, CATEGORIES + 1)]
        stream.write(f'], "categories": {json.dumps(categories)}}}')
    return total
