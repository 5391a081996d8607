"""Checkpoints of a training run, from which it resumes to the bit.

A checkpoint holds the model, its running statistics merged over the ranks, the optimizer, the loss scaler, the config
and, of every rank, its random states and its own buffers, with which it goes on: how often a run saves then leaves no
trace in it. The position in the data is the iteration, the number of steps done.
"""

import logging
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fvcore.common.config import CfgNode
from torch import nn

from ..config import OPTIONS, RENAMED, flatten
from ..config.schema.model import NUM_CLASSES
from ..data.files import open_file
from ..distributed import barrier, gather_objects, rank, world_size
from ..errors import UserError, cut, one_line, quote
from ..modeling.checkpoint_file import read_checkpoint, write_checkpoint
from ..modeling.description import describe_model
from ..modeling.weights import load_weights
from ..output import remove_leftovers, replace_file
from ..paths import user_path
from ..statistics.merge import merge_population_statistics
from ..statistics.preserve import preserve_state
from .average import WeightAverage
from .checkpoint_check import PARTS

# What a run fills in where a config leaves it open: see `data.classes.with_classes`.
_FILLED_IN = ("MODEL.CLASS_NAMES", *NUM_CLASSES.values())
# What a resumed run may choose anew: nothing here changes the weights that training arrives at.
_FREE_KEYS = (
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.TEST",
    "TEST.",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.CHECKPOINT_KEEP",
)
logger = logging.getLogger(__name__)

_ABSENT = object()


def save_checkpoint(folder: str | Path, name: str, state: dict[str, Any]) -> Path:
    """Write `state` to `folder/name`, then the name to `folder/last_checkpoint`; each whole or not at all.

    Nobody else writes to `folder`: what a writer that was killed left behind is removed.
    """
    file = user_path(folder) / name
    remove_leftovers(folder)
    write_checkpoint(state, file)
    with replace_file(file.with_name("last_checkpoint")) as stream:
        stream.write(name)
    return file


def last_checkpoint(folder: str | Path) -> Path | None:
    """The file that `folder/last_checkpoint` names; None where there is none yet.

    Raises:
        UserError: it names no file in `folder`.
    """
    pointer = user_path(folder) / "last_checkpoint"
    try:
        with open_file(pointer) as stream:
            content = stream.read(1000)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{pointer}: cannot be read: {error.strerror}") from error
    name = content.decode("utf-8", "replace").strip()
    plain = name.isprintable() and "\ufffd" not in name and len(name.encode()) < 256
    if not plain or Path(name).name != name or name in ("", ".."):
        raise UserError(
            f"{pointer}: expected the name of a checkpoint beside it, such as model_final.pth, got {quote(name)}"
        )
    return pointer.with_name(name)


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
                "description": describe_model(cfg, model),
            }
            if average:
                state["average"] = average.average.state_dict()
            save_checkpoint(cfg.OUTPUT_DIR, name, state)
            remove_older(cfg.OUTPUT_DIR, iteration, cfg.SOLVER.CHECKPOINT_KEEP)
    barrier()


def checkpoint_period(cfg: CfgNode) -> int:
    """`SOLVER.CHECKPOINT_PERIOD` or, where it is 0, what suits the length of the run."""
    return cfg.SOLVER.CHECKPOINT_PERIOD or min(5000, max(cfg.SOLVER.MAX_ITER // 10, 1))


def remove_older(folder: str | Path, iteration: int, keep: int) -> None:
    """Delete the checkpoints before the last `keep` of those up to `iteration`; 0: none. Those with names stay."""
    numbers = {
        int(name[1]): path
        for path in user_path(folder).iterdir()
        if (name := re.fullmatch(r"model_(\d{7,})\.pth", path.name))
    }
    older = sorted(number for number in numbers if number <= iteration)[: -keep or None] if keep else []
    for number in older:
        numbers[number].unlink(missing_ok=True)


def save_model(cfg: CfgNode, name: str, model: nn.Module) -> None:
    """Save the weights alone, for evaluation and fine-tuning. Rank 0 writes."""
    if rank() == 0:
        content = {"model": model.state_dict(), "config": cfg.dump(), "description": describe_model(cfg, model)}
        write_checkpoint(content, user_path(cfg.OUTPUT_DIR) / name)
    barrier()


def read_training(cfg: CfgNode, file: Path) -> dict[str, Any]:
    """The checkpoint in `file`, whose config fits this run.

    Raises:
        UserError: it cannot be read, or was trained with another config.
    """
    checkpoint = read_checkpoint(file)
    if missing := [part for part in PARTS if part not in checkpoint]:
        raise UserError(f"checkpoint {file}: holds no training to resume: {missing[-1]!r} is not in it")
    iteration, ranks = checkpoint["iteration"], checkpoint["ranks"]
    if type(iteration) is not int or iteration < 0 or not isinstance(ranks, list) or not ranks:
        raise UserError(f"checkpoint {file}: broken: its iteration or its ranks are none")
    then = config_in(checkpoint["config"], file)
    now = flatten(cfg)
    # A key that only one of them has came or went with a version of this library.
    solver = cfg.SOLVER
    shares = [solver.FREEZE_NORM_AT, solver.AVERAGE_WEIGHTS_FROM]
    if "BRN" in (value for key, value in now.items() if key.endswith(".NORM")):
        shares += [cfg.MODEL.NORM.BRN[name] for name in ("BN_UNTIL", "R_MAX_AT", "D_MAX_AT")]
    spanned = solver.LR_SCHEDULER != "steps" or any(0 < share < 1 for share in shares)  # by MAX_ITER
    free = _FREE_KEYS + (() if spanned else ("SOLVER.MAX_ITER",))
    bound = ("TEST.RECOMPUTE.",) if solver.FREEZE_NORM_RECOMPUTE or cfg.TEST.RECOMPUTE.IN_CHECKPOINT else ()
    changed = [
        f"{key} was {quote(then[key])}, is {quote(now[key])}"
        for key in now
        if key in then
        and then[key] != now[key]
        and (not key.startswith(free) or key.startswith(bound))
        and (now[key] or key not in _FILLED_IN)
    ]
    if changed:
        rest = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(f"cannot resume {file} with another config: {'; '.join(changed[:3])}{rest}")
    if iteration > cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"cannot resume {file}: it is trained to iteration {iteration} already, "
            f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}"
        )
    if solver.AVERAGE_WEIGHTS and "average" not in checkpoint:
        raise UserError(f"cannot resume {file}: it holds no averaged weights; set SOLVER.AVERAGE_WEIGHTS ''")
    return checkpoint


def other_choices(cfg: CfgNode, file: str | Path) -> str:
    """What the model in `file` was trained with and `cfg` has otherwise, as one line; "" where there is nothing."""
    if not user_path(file).is_file() or "config" not in (content := read_checkpoint(file)):
        return ""
    then, now = config_in(content["config"], Path(file)), flatten(cfg)
    free = ("MODEL.WEIGHTS", "MODEL.DEVICE")
    keys = [key for key in now if key.startswith("MODEL.") and key not in free and not key.endswith("_TEST")]
    changed = [
        f"{key} {quote(then[key])} (here: {quote(now[key])})"
        for key in keys
        if key in then and then[key] != now[key] and key not in _FILLED_IN
    ]
    return f"{file} was trained with another model: {', '.join(changed[:5])}" if changed else ""


def restore_training(
    checkpoint: dict[str, Any],
    file: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: WeightAverage | None = None,
    *,
    seed: int,
) -> None:
    """Put this rank where it was when it saved `checkpoint`, of which `check_training` has found nothing wrong."""
    ranks = checkpoint["ranks"]
    same = len(ranks) == world_size()
    own = ranks[rank()] if same else {"buffers": {}}  # those of "model" are merged over the ranks
    load_weights(model, checkpoint["model"] | own["buffers"], file)
    groups = optimizer.state_dict()["param_groups"]  # of the config, which is that of the checkpoint
    optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
    _arrange_in_first_step(optimizer)
    scaler.load_state_dict(checkpoint["scaler"])
    if average:
        average.average.load_state_dict(checkpoint["average"])
    if same:
        _set_random_states(own["random"])
    else:
        seed_generators(int(np.random.SeedSequence([seed, rank(), checkpoint["iteration"]]).generate_state(1)[0]))
        logger.warning(
            "%s was saved by %d processes, these are %d: the run goes on at the same step and place in the data, but "
            "with other random numbers and sums: not to the bit as it would have",
            *(file, len(ranks), world_size()),
        )


def _arrange_in_first_step(optimizer: torch.optim.Optimizer) -> None:
    """Give the state the memory format that the parameters have then: a fused optimizer takes them for the same."""

    def arrange(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                of_shape = isinstance(value, torch.Tensor) and value.shape == parameter.shape
                if of_shape and value.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        handle.remove()

    handle = optimizer.register_step_pre_hook(arrange)


def config_in(text: Any, file: Path) -> dict[str, Any]:
    """The options in the config of a checkpoint that are known, by their present names.

    Raises:
        UserError: it is no YAML.
    """
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"checkpoint {file}: its config is broken: {cut(one_line(error))}") from error
    values = {}
    for name in (*RENAMED, *OPTIONS):
        node = tree
        for part in name.split("."):
            node = node.get(part, _ABSENT) if isinstance(node, dict) else _ABSENT
        if node is not _ABSENT:
            values[RENAMED.get(name, name)] = node
    return values


def seed_generators(seed: int) -> None:
    """Seed those of torch, Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


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
