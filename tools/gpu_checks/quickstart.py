"""The quickstart, as its users start it: AP and time."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import train_net
from benchmarks.table import Row

from domainnorm.data.shapes import shapes_dataset

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
LEAST = {"population": 45.0, "minibatch": 20.0}  # AP; README.md has 55 and 35
SMALL = (
    "SOLVER.MAX_ITER",
    "2",
    "SOLVER.WARMUP_ITERS",
    "1",
    "SOLVER.IMS_PER_BATCH",
    "2",
    "MODEL.FPN.OUT_CHANNELS",
    "16",
)


def measure(device: str, small: bool) -> Iterator[Row]:
    """AP of each kind of statistics, with the seconds of all, and of a training step."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DOMAINNORM_DATA"] = f"{folder}/data"  # generated anew, which is a part of the time
        words = ["OUTPUT_DIR", f"{folder}/output", "MODEL.DEVICE", device]
        if small:
            few = ":".join(map(str, shapes_dataset("shapes_val", 4)))
            words += [*SMALL, "DATASETS.TRAIN", f"[{few!r}]", "DATASETS.TEST", f"[{few!r}]"]
        began = time.perf_counter()
        code = train_net.main(["--config-file", str(CONFIG), *words])
        seconds = time.perf_counter() - began
        if code:
            raise SystemExit(code)
        results = json.loads(Path(folder, "output", "results.json").read_text(encoding="utf-8"))
        lines = Path(folder, "output", "metrics.json").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "time" in line]
    for statistics, scores in results.items():
        ap = scores["bbox"]["AP"]
        yield {
            "statistics": statistics,
            "AP": ap,
            "AP50": scores["bbox"]["AP50"],
            "seconds, all": seconds,
            "seconds, a step": steps[-1]["time"],
            "of it, data": steps[-1]["data_time"],
            "MB at the peak": steps[-1]["max_memory_mb"],
            "passed": ap is not None and (small or ap >= LEAST[statistics]),
        }
