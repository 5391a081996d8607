"""What a run has left in its output folder: config, results and metrics."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from ..config import load_config
from ..data import by_name
from ..errors import UserError
from ..paths import user_path

KINDS = {"bbox": "boxes", "segm": "masks", "classification": "classes"}  # in a result, and as text


@dataclass(frozen=True)
class Run:
    """The files of a run, read.

    Attributes:
        results: `{statistics: {name of the data set: {"bbox": {"AP": …}}}}`, None for nan; {} where there are none.
        metrics: the lines of `metrics.json`, which has one for each 20 steps and one for each evaluation.
    """

    folder: Path
    cfg: CfgNode
    results: dict[str, dict[str, dict[str, dict[str, float | None]]]]
    metrics: list[dict[str, Any]]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Iterations, and a metric there, such as "total_loss" or "population/bbox/AP"."""
        lines = [line for line in self.metrics if line.get(name) is not None]
        return [line["iteration"] for line in lines], [line[name] for line in lines]

    def evaluated(self, metric: str) -> list[str]:
        """The names that `metric` has in evaluations, such as "population/bbox/AP"."""
        names = dict.fromkeys(name for line in self.metrics for name in line)
        return [name for name in names if name.endswith(f"/{metric}")]


def read_run(folder: str | Path, cfg: CfgNode | None = None) -> Run:
    """What `folder` holds.

    Args:
        cfg: None: that of the folder's `config.yaml`.

    Raises:
        UserError: it is no output folder, or a file in it is broken.
    """
    folder = user_path(folder)
    if cfg is None:
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: has no config.yaml; give the OUTPUT_DIR of a training")
        cfg = load_config(folder / "config.yaml")
    results = _read(folder / "results.json") or {}
    if any(set(sets) <= set(KINDS) for sets in results.values()):  # of one data set
        only = next(iter(by_name(cfg.DATASETS.TEST)), "")
        results = {name: {only: scores} for name, scores in results.items()}
    lines = (folder / "metrics.json").read_text("utf-8").splitlines() if (folder / "metrics.json").is_file() else []
    return Run(folder, cfg, results, [line for line in map(_line, lines) if line])


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}; evaluate again to write it anew") from error


def read_predictions(folder: Path) -> list[dict[str, Any]] | None:
    """The predictions in a folder of `inference/`; None if there are none."""
    for name in ("coco_instances_results.json", "classification_results.json"):
        if (found := _read(folder / name)) is not None:
            return found
    return None


def _line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:  # the last one of a run that was killed
        return None
    return line if isinstance(line, dict) and "iteration" in line else None
