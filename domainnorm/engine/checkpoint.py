"""Checkpoints of a training run, from which it resumes to the bit.

A checkpoint holds the model, its running statistics merged over the ranks, the optimizer, the loss scaler, the config
and, of every rank, its random states and its own buffers, with which it goes on: how often a run saves then leaves no
trace in it. The position in the data is the iteration, the number of steps done.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fvcore.common.config import CfgNode
from torch import nn

from ..config import RENAMED, flatten
from ..distributed import barrier, gather_objects, rank, world_size
from ..errors import UserError
from ..modeling.weights import load_weights, read_checkpoint
from ..output import replace_file
from ..statistics.merge import merge_population_statistics
from ..statistics.preserve import preserve_state
from .average import WeightAverage

# What a resumed run may choose anew: nothing here changes the weights that training arrives at.
_FREE_KEYS = (
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.TEST",
    "TEST.",
    "SOLVER.CHECKPOINT_PERIOD",
)


def save_checkpoint(folder: str | Path, name: str, state: dict[str, Any]) -> Path:
    """Write `state` to `folder/name`, then the name to `folder/last_checkpoint`; each whole or not at all."""
    file = Path(folder) / name
    with replace_file(file, "wb") as stream:
        torch.save(state, stream)
    with replace_file(file.with_name("last_checkpoint")) as stream:
        stream.write(name)
    return file


def last_checkpoint(folder: str | Path) -> Path | None:
    """The file that `folder/last_checkpoint` names; None where there is none yet."""
    pointer = Path(folder) / "last_checkpoint"
    if not pointer.is_file():
        return None
    return pointer.with_name(pointer.read_text(encoding="utf-8").strip())


def save_training(
    cfg: CfgNode,
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    iteration: int,
    average: WeightAverage | None = None,
) -> None:
    """Save the whole state of training after `iteration` steps. Every rank calls it, rank 0 writes."""
    names = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    buffers = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items() if name in names}
    ranks = gather_objects({"random": _random_states(), "buffers": buffers})
    with preserve_state(model):
        merge_population_statistics(model)
        if rank() == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "iteration": iteration,
                "ranks": ranks,
                "config": cfg.dump(),
            }
            if average:
                state["average"] = average.average.state_dict()
            save_checkpoint(cfg.OUTPUT_DIR, name, state)
    barrier()


def save_model(cfg: CfgNode, name: str, model: nn.Module) -> None:
    """Save the weights alone, for evaluation and fine-tuning. Rank 0 writes."""
    if rank() == 0:
        with replace_file(Path(cfg.OUTPUT_DIR) / name, "wb") as stream:
            torch.save({"model": model.state_dict()}, stream)
    barrier()


def read_training(cfg: CfgNode) -> dict[str, Any] | None:
    """The last checkpoint of `cfg.OUTPUT_DIR`, checked against this run; None where there is none.

    Raises:
        UserError: it cannot be read, or was trained with another config or another number of processes.
    """
    file = last_checkpoint(cfg.OUTPUT_DIR)
    if file is None:
        return None
    checkpoint = read_checkpoint(file)
    if missing := {"model", "optimizer", "scaler", "iteration", "ranks", "config"} - checkpoint.keys():
        raise UserError(f"checkpoint {file}: holds no training to resume: {sorted(missing)[0]!r} is not in it")
    then = {RENAMED.get(key, key): value for key, value in flatten(yaml.safe_load(checkpoint["config"])).items()}
    now = flatten(cfg)
    # A key that only one of them has came or went with a version of this library.
    solver = cfg.SOLVER
    shares = (solver.FREEZE_NORM_AT, solver.AVERAGE_WEIGHTS_FROM)
    spanned = solver.LR_SCHEDULER == "cosine" or any(0 < share < 1 for share in shares)  # by MAX_ITER
    free = _FREE_KEYS + (() if spanned else ("SOLVER.MAX_ITER",))
    bound = ("TEST.RECOMPUTE.",) if solver.FREEZE_NORM_RECOMPUTE or cfg.TEST.RECOMPUTE.IN_CHECKPOINT else ()
    changed = [
        f"{key} was {then[key]!r}, is {now[key]!r}"
        for key in now
        if key in then and then[key] != now[key] and (not key.startswith(free) or key.startswith(bound))
    ]
    if changed:
        rest = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(f"cannot resume {file} with another config: {'; '.join(changed[:3])}{rest}")
    if checkpoint["iteration"] > cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"cannot resume {file}: it is trained to iteration {checkpoint['iteration']} already, "
            f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}"
        )
    if solver.AVERAGE_WEIGHTS and "average" not in checkpoint:
        raise UserError(f"cannot resume {file}: it holds no averaged weights; set SOLVER.AVERAGE_WEIGHTS ''")
    if len(checkpoint["ranks"]) != world_size():
        raise UserError(
            f"cannot resume {file}: it was trained by {len(checkpoint['ranks'])} processes, these are {world_size()}"
        )
    return checkpoint


def restore_training(
    checkpoint: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: WeightAverage | None = None,
) -> None:
    """Put this rank where it was when it saved `checkpoint`."""
    own = checkpoint["ranks"][rank()]
    load_weights(model, checkpoint["model"] | own["buffers"], "checkpoint")
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    if average:
        average.average.load_state_dict(checkpoint["average"])
    _set_random_states(own["random"])


def _random_states() -> dict[str, Any]:
    """The states of the generators of torch, Python and numpy, in types that `weights_only` loads."""
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    states = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
