"""What the rows of the study `peers` share: data, arguments, and AP as this library computes it."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from domainnorm.evaluation import evaluate_coco
from domainnorm.output import output_folder, write_json

LABORATORIES = ("pbc", "bccd")  # trained on the first, tested on both
SIZE = 256  # pixels of a side
BATCH = 4

# image file -> its boxes XYXY, scores and labels from 0, in the pixels of the file
Found = tuple[list[list[float]], list[float], list[int]]


def parser(about: str | None) -> argparse.ArgumentParser:
    """The arguments of a row."""
    made = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    made.add_argument("--data", type=Path, required=True, help="folder with {train,val}_{pbc,bccd}.json and images/")
    made.add_argument("--plain", action="store_true", help="no augmentation")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, required=True)
    return made


def read(data: Path, split: str, laboratory: str) -> dict[str, Any]:
    """The contents of a COCO file."""
    return json.loads((data / f"{split}_{laboratory}.json").read_text(encoding="utf-8"))


def scores(data: Path, find: Callable[[list[Path]], Iterator[Found]]) -> dict[str, Any]:
    """AP in each laboratory, at the path where that of this library is: `population/pbc/bbox`."""
    found = {}
    for laboratory in LABORATORIES:
        truth = read(data, "val", laboratory)
        ids = [category["id"] for category in truth["categories"]]
        files = [data / "images" / image["file_name"] for image in truth["images"]]
        predictions = [
            {"image_id": image["id"], "category_id": ids[label], "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
            for image, of_image in zip(truth["images"], find(files), strict=True)
            for (x0, y0, x1, y1), score, label in zip(*of_image, strict=True)
        ]
        found[laboratory] = {"bbox": evaluate_coco(predictions, truth)}
    return {"population": found}


def finish(out: Path, results: dict[str, Any], cpu_seconds: float) -> None:
    """Write what the study reads."""
    write_json(output_folder(out, "--out") / "results.json", results | {"cpu_seconds": cpu_seconds})
