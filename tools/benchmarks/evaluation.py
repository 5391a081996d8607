"""AP of boxes and of masks, evaluated by domainnorm and by plain use of pycocotools.

The data set is synthetic, with COCO's proportions. Measured is everything from predictions and ground truth as dicts to
the scores, which must agree to the last bit. Each evaluation runs in its own process; time is its CPU time, memory the
peak above what it held before.
"""

import argparse
import contextlib
import io
import pickle
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from domainnorm.evaluation import evaluate_coco

from .fresh import in_fresh_process, peak_of
from .table import Row
from .timing import ratio

HEIGHT, WIDTH = 480, 640
CATEGORIES = 80
OBJECTS = 7  # an image, on average
CIRCLE = np.stack([np.cos(np.arange(12) * np.pi / 6), np.sin(np.arange(12) * np.pi / 6)], axis=1)
Data = tuple[list[dict[str, Any]], dict[str, Any]]  # predictions, ground truth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--boxes", type=int, default=100, help="number of predictions per image, each with a mask")
    parser.add_argument("--repeats", type=int, default=3, help="number of timings, of which the median is taken")


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Boxes, then masks."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.pickle"
        file.write_bytes(pickle.dumps(make_data(args.images, args.boxes)))
        for kind in ("bbox", "segm"):
            yield compare(file, kind, args.repeats) | {"images": args.images, "boxes an image": args.boxes}


def compare(file: Path, kind: str, repeats: int) -> Row:
    """Both ways in turn, as often as `repeats` says; figures are medians."""
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    megabytes: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(repeats):
        scores = {}
        for way in seconds:
            scores[way], taken, held = in_fresh_process(evaluated, way, file, kind)
            seconds[way].append(taken)
            megabytes[way].append(held)
        np.testing.assert_array_equal(scores["ours"], scores["plain"])  # exactly; nan equals nan
    return {
        "kind": kind,
        "time, ours / plain": ratio(seconds, "ours", "plain"),
        "memory, ours / plain": ratio(megabytes, "ours", "plain"),
        **{f"s, {way}": statistics.median(values) for way, values in seconds.items()},
        **{f"MB, {way}": statistics.median(values) for way, values in megabytes.items()},
        "AP": scores["ours"][0],
    }


def evaluated(way: str, file: Path, kind: str) -> tuple[list[float], float, float]:
    """In a process of its own: the numbers, CPU seconds, and megabytes at the peak beyond those before."""
    predictions, truth = pickle.loads(file.read_bytes())
    if kind == "segm":
        for prediction in predictions:
            del prediction["bbox"]  # pycocotools would take the area of a mask from a box beside it
    began = time.process_time()
    scores, held = peak_of(lambda: (ours if way == "ours" else plain)(predictions, truth, kind))
    return scores, time.process_time() - began, held


def make_data(images: int, boxes: int, seed: int = 0) -> Data:
    """Objects, and near them predictions of which some are right; masks are ellipses (to a polygon's precision)."""
    rng = np.random.default_rng(seed)
    truth: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(images)],
        "categories": [{"id": k, "name": str(k)} for k in range(1, CATEGORIES + 1)],
        "annotations": [],
    }
    predictions: list[dict[str, Any]] = []
    for image_id in range(images):
        objects = _boxes(rng, rng.poisson(OBJECTS))
        # As in COCO, an image has few of the categories, and of these many objects.
        labels = rng.choice(rng.integers(1, CATEGORIES + 1, 3), len(objects))
        for entry in _entries(image_id, objects, labels):
            crowd = int(rng.random() < 0.01)
            number = len(truth["annotations"]) + 1
            area = float(coco_mask.area(entry["segmentation"]))
            truth["annotations"].append(entry | {"id": number, "iscrowd": crowd, "area": area})
        found, kinds = _boxes(rng, boxes), rng.integers(1, CATEGORIES + 1, boxes)
        if len(objects):
            near = rng.integers(len(objects), size=boxes)
            spread = np.tile(objects[near, 2:], 2) * rng.exponential(0.15, (boxes, 1))
            found = _inside(objects[near] + spread * rng.normal(size=(boxes, 4)))
            kinds = np.where(rng.random(boxes) < 0.7, labels[near], kinds)
        for entry, score in zip(_entries(image_id, found, kinds), rng.random(boxes).tolist(), strict=True):
            predictions.append(entry | {"score": score})
    return predictions, truth


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4), XYWH: of COCO's sizes, from small to large in about equal parts."""
    sizes = np.exp(rng.normal(4.1, 0.9, (count, 2)))
    return _inside(np.concatenate([rng.random((count, 2)) * (WIDTH, HEIGHT) - sizes / 2, sizes], axis=1))


def _inside(xywh: np.ndarray) -> np.ndarray:
    """Boxes as far as they lie in the image, and of two pixels at least."""
    size = np.array([WIDTH, HEIGHT])
    lower = xywh[:, :2].clip(0, size - 2)
    return np.concatenate([lower, (xywh[:, :2] + xywh[:, 2:]).clip(lower + 2, size) - lower], axis=1)


def _entries(image_id: int, xywh: np.ndarray, category_ids: np.ndarray) -> Iterator[dict[str, Any]]:
    if not len(xywh):
        return
    ellipses = xywh[:, None, :2] + xywh[:, None, 2:] * (CIRCLE + 1) / 2
    rles = coco_mask.frPyObjects(list(ellipses.reshape(len(xywh), -1)), HEIGHT, WIDTH)
    for box, category_id, rle in zip(xywh.tolist(), category_ids.tolist(), rles, strict=True):
        mask = {"size": rle["size"], "counts": rle["counts"].decode()}
        yield {"image_id": image_id, "category_id": category_id, "bbox": box, "segmentation": mask}


def ours(predictions: list[dict[str, Any]], truth: dict[str, Any], kind: str) -> list[float]:
    return list(evaluate_coco(predictions, truth, kind).values())[:12]


def plain(predictions: list[dict[str, Any]], truth: dict[str, Any], kind: str) -> list[float]:
    """The same twelve numbers, as pycocotools' own example gets them."""
    coco = COCO()
    coco.dataset = truth
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(predictions), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * value if value > -1 else float("nan") for value in evaluation.stats.tolist()]
