#!/usr/bin/env python
"""YOLO11n of ultralytics: a row of the study `peers`.

    tools/studies/peer_ultralytics.py --python PYTHON --data FOLDER [--plain] [--epochs 36] [--seed 0] --out FOLDER

ultralytics has its own environment, whose interpreter is `--python`. It trains `yolo11n.yaml` from random weights, and
predicts, in a separate process that runs this file again; both exchange YOLO files and JSON. Nothing is downloaded.
Options are its defaults except for the image size, the batch and the number of epochs.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PLAIN = dict.fromkeys(("mosaic", "hsv_h", "hsv_s", "hsv_v", "translate", "scale", "fliplr"), 0.0)


def convert(data: Path, folder: Path) -> Path:
    """The training images and labels as YOLO has them."""
    import peers

    truth = peers.read(data, "train", peers.LABORATORIES[0])
    labels = {category["id"]: k for k, category in enumerate(truth["categories"])}
    names = [category["name"] for category in truth["categories"]]
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for image in truth["images"]:
        source = (data / "images" / image["file_name"]).resolve()
        link = folder / "images" / source.name
        link.unlink(missing_ok=True)
        link.symlink_to(source)
        width, height = image["width"], image["height"]
        lines = []
        for annotation in truth["annotations"]:
            if annotation["image_id"] == image["id"]:
                x, y, w, h = annotation["bbox"]
                center = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                lines.append(" ".join([str(labels[annotation["category_id"]]), *(f"{v:.6f}" for v in center)]))
        (folder / "labels" / f"{source.stem}.txt").write_text("\n".join(lines))
    (folder / "val.txt").write_text(f"./images/{source.name}")  # there has to be one: after training it is validated
    file = folder / "data.yaml"  # JSON is YAML
    file.write_text(json.dumps({"path": str(folder), "train": "images", "val": "val.txt", "names": names}))
    return file


def train_and_predict(job: dict[str, Any]) -> None:
    """In ultralytics' environment: weights, the CPU seconds of training, and what is found in the files of the job."""
    from ultralytics import YOLO

    model = YOLO("yolo11n.yaml")
    began = time.process_time()
    model.train(**job["train"])
    seconds = time.process_time() - began
    trained = YOLO(Path(job["train"]["project"], job["train"]["name"], "weights", "last.pt"))
    found = {}
    for file in job["files"]:
        (result,) = trained.predict(file, **job["predict"])
        boxes = result.boxes
        found[file] = [boxes.xyxy.tolist(), boxes.conf.tolist(), boxes.cls.int().tolist()]
    Path(job["answer"]).write_text(json.dumps({"found": found, "seconds": seconds}))


def main() -> None:
    import peers

    parser = peers.parser(__doc__)
    parser.add_argument("--python", required=True, help="interpreter of an environment with ultralytics")
    parser.add_argument("--epochs", type=int, default=36)
    args = parser.parse_args()
    out = args.out.resolve()
    data = convert(args.data, out / "data")
    files = [
        str(args.data / "images" / image["file_name"])
        for laboratory in peers.LABORATORIES
        for image in peers.read(args.data, "val", laboratory)["images"]
    ]
    train = {"data": str(data), "epochs": args.epochs, "imgsz": peers.SIZE, "batch": peers.BATCH, "seed": args.seed}
    train |= {"project": str(out), "name": "run", "exist_ok": True, "device": "cpu", "workers": 0, "amp": False}
    train |= {"pretrained": False, "val": False, "plots": False} | (PLAIN if args.plain else {})
    predict = {"imgsz": peers.SIZE, "conf": 0.001, "max_det": 100, "device": "cpu", "verbose": False}
    job = {"train": train, "predict": predict, "files": files, "answer": str(out / "answer.json")}
    environment = os.environ | {"YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": str(out)}
    subprocess.run([args.python, __file__, json.dumps(job)], env=environment, cwd=out, check=True)
    answer = json.loads((out / "answer.json").read_text())

    def find(wanted: list[Path]) -> Iterator[peers.Found]:
        for file in wanted:
            boxes, confidences, labels = answer["found"][str(file)]
            yield boxes, confidences, labels

    peers.finish(out, peers.scores(args.data, find), answer["seconds"])


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):  # a job
        train_and_predict(json.loads(sys.argv[1]))
    else:
        main()
