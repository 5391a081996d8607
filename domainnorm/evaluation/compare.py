"""One model, evaluated with several statistics, side by side."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from ..config_checks import STATISTICS
from ..convert import left_as_found, set_statistics
from ..data import test_loader
from ..distributed import gather_objects, get_device, rank, world_size
from ..errors import UserError
from ..output import output_folder, replace_file
from ..population import merge_population_statistics
from .coco import METRICS, evaluate_coco, predict
from .recompute import recompute


def evaluate(cfg: CfgNode, model: nn.Module, statistics: str | Sequence[str] | None = None) -> dict[str, Any]:
    """AP of `model` on `cfg.DATASETS.TEST`, for each of `statistics`; printed as one table. Every rank calls it.

    Running statistics that differ between ranks are merged for it. Training goes on after it as if it had not been:
    modes, statistics, buffers and random states are put back.

    Args:
        statistics: "population", "minibatch", "recomputed" or a list of them; None: `cfg.TEST.STATISTICS`.

    Returns:
        On every rank `{statistics: {"bbox": {"AP": …, …}}}`, with "segm" beside "bbox" if `MODEL.MASK_ON`, in percent,
        nan where there is nothing to find; with several test sets `{statistics: {data set: {"bbox": …}}}`. The same
        goes, with null for nan, to `OUTPUT_DIR/results.json`, and the predictions to
        `OUTPUT_DIR/inference/<statistics>[/<data set>]/coco_instances_results.json`.
    """
    names = [statistics] if isinstance(statistics, str) else list(statistics or cfg.TEST.STATISTICS)
    for name in names:
        if name not in STATISTICS:
            raise UserError(f"statistics take any of {list(STATISTICS)}, got {name!r}")
    sets = list(cfg.DATASETS.TEST)
    if not sets:
        raise UserError("DATASETS.TEST is empty: name a data set to evaluate on")
    loaders = {data_set: test_loader(cfg, data_set, rank=rank(), world_size=world_size()) for data_set in sets}
    if "recomputed" in names and cfg.TEST.RECOMPUTE.DATASET:
        test_loader(cfg, cfg.TEST.RECOMPUTE.DATASET, rank=rank(), world_size=world_size())  # its categories must fit
    folder = output_folder(cfg.OUTPUT_DIR)
    device = get_device(cfg.MODEL.DEVICE)
    results: dict[str, Any] = {}
    iou_types = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    truths = {data_set: loader.dataset.ground_truth() if rank() == 0 else {} for data_set, loader in loaders.items()}
    for name in names:
        results[name] = {}
        with left_as_found(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            merge_population_statistics(model)
            if name == "recomputed":
                recompute(cfg, set_statistics(model, "auto"))
            set_statistics(model.eval(), "minibatch" if name == "minibatch" else "population")
            for data_set, loader in loaders.items():
                predictions = predict(model, loader, device)
                scores = {}
                if rank() == 0:
                    where = folder / "inference" / name / (_file_name(data_set) if len(sets) > 1 else "")
                    _write_json(where / "coco_instances_results.json", predictions)
                    scores = {kind: evaluate_coco(predictions, truths[data_set], kind) for kind in iou_types}
                results[name][data_set] = gather_objects(scores)[0]
    if rank() == 0:
        print(format_table(results))
    if len(sets) == 1:
        results = {name: result[sets[0]] for name, result in results.items()}
    if rank() == 0:
        _write_json(folder / "results.json", _nan_to_none(results))
    return results


def format_table(results: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """`{statistics: {data set: {"bbox": {"AP": …}}}}` as lines of text, one a statistics, data set and kind of AP."""
    several = len(next(iter(results.values()))) > 1
    rows = []
    for name, sets in results.items():
        for data_set, scores in sets.items():
            for kind, values in scores.items():
                cells = ["-" if math.isnan(values[m]) else f"{values[m]:.2f}" for m in METRICS]
                labels = [name, *([data_set] if several else []), *([kind] if len(scores) > 1 else [])]
                rows.append([" ".join(labels), *cells])
    width = max(len("statistics"), *(len(row[0]) for row in rows))
    rows.insert(0, ["statistics", *METRICS])
    return "\n".join(f"{row[0]:<{width}}" + "".join(f"{cell:>8}" for cell in row[1:]) for row in rows)


def _file_name(data_set: str) -> str:
    return re.sub(r"[^\w.-]+", "_", data_set)


def _nan_to_none(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _nan_to_none(value) for key, value in tree.items()}
    return None if math.isnan(tree) else tree


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(file) as stream:
        json.dump(content, stream)
