"""Training: one loop, in plain sight."""

import contextlib
import logging
import math
import random
import time
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..config import iteration_of, save_config
from ..data import test_loader, train_loader
from ..data.sampler import images_per_forward
from ..distributed import get_device, rank, to_device, world_size
from ..errors import UserError
from ..evaluation import evaluate, recompute
from ..evaluation.recompute import batch_size
from ..layers import DomainBatchNorm
from ..modeling import build_model
from ..modeling.channels_last import ChannelsLast
from ..output import output_folder
from ..statistics.merge import merge_population_statistics
from ..statistics.virtual_batch import virtual_batch
from .average import WeightAverage
from .check import check_model
from .checkpoint import read_training, restore_training, save_model, save_training
from .describe import describe_normalization
from .freeze import freeze_norm
from .log import TrainingLog, setup_logging
from .optim import build_optimizer, clip_gradients, learning_rate, warn_about_schedule

logger = logging.getLogger(__name__)


def train(cfg: CfgNode, *, resume: bool = False) -> nn.Module:
    """Train what `cfg` says, on every rank; into `cfg.OUTPUT_DIR` go checkpoints, logs and results.

    Args:
        cfg: from `load_config`.
        resume: continue from the last checkpoint in `OUTPUT_DIR`, or start where there is none. The result equals
            that of a run that was never stopped, to the bit, on a device whose kernels are deterministic (a CPU).

    Returns:
        The trained model, or the average of its weights if `SOLVER.AVERAGE_WEIGHTS`, not wrapped for several
        processes; its running statistics are those of all ranks.

    Raises:
        UserError: anything the user can mend: a contradiction in `cfg`, an `OUTPUT_DIR` that cannot be written, a
            checkpoint of another run; a loss, gradient or weight that is not finite (checkpoints stay as they were).

    Example::

        >>> model = dn.train(dn.load_config("quickstart.yaml"))  # doctest: +SKIP
    """
    solver = cfg.SOLVER
    device = get_device(cfg.MODEL.DEVICE)
    amp = getattr(torch, solver.AMP.DTYPE)
    if solver.AMP.ENABLED and amp == torch.float16 and device.type == "cpu":
        raise UserError("SOLVER.AMP.DTYPE 'float16' needs CUDA, and MODEL.DEVICE is a CPU here: use bfloat16")
    size = images_per_forward(cfg, world_size())

    # What can be wrong with the input shows before anything is written, and not after days of training.
    setup_logging()
    checkpoint = read_training(cfg) if resume else None
    start = checkpoint["iteration"] if checkpoint else 0
    ranks = {"rank": rank(), "world_size": world_size()}
    batches = train_loader(cfg, **ranks, start_iteration=start)
    batch_size(cfg)
    for name in filter(None, (*cfg.DATASETS.TEST, cfg.TEST.RECOMPUTE.DATASET, cfg.TEST.EXAMPLE_WEIGHT_DATASET)):
        test_loader(cfg, name, **ranks)
    _seed(cfg.SEED)  # the same weights on every rank
    model = build_model(cfg).train()
    if isinstance(model, ChannelsLast):
        model.weights_last = device.type == "cpu" and world_size() == 1
    check_model(cfg, model)
    folder = output_folder(cfg.OUTPUT_DIR)
    setup_logging(folder)
    if rank() == 0:
        save_config(cfg, folder / "config.yaml")
        warn_about_schedule(cfg)

    optimizer = build_optimizer(cfg, model)
    scaler = torch.amp.GradScaler(device.type, enabled=solver.AMP.ENABLED and amp == torch.float16)
    frozen_at = iteration_of(cfg, solver.FREEZE_NORM_AT) if solver.FREEZE_NORM_AT else solver.MAX_ITER
    if frozen_at < start:
        freeze_norm(cfg, model)
    average = WeightAverage(cfg, model) if solver.AVERAGE_WEIGHTS else None
    network = _distributed(model, device)
    _seed(cfg.SEED + rank())
    if checkpoint:
        if world_size() > 1:
            _first_backward(cfg, network, device, start)
        restore_training(checkpoint, model, optimizer, scaler, average)
    del checkpoint  # as large as the model and its optimizer
    log = TrainingLog(folder, start, solver.MAX_ITER, device)
    logger.info("%s", describe_normalization(cfg, model))
    logger.info("training from iteration %d to %d on %s, %d processes", start, solver.MAX_ITER, device, world_size())

    for iteration in range(start, solver.MAX_ITER):
        if iteration == frozen_at:
            if solver.FREEZE_NORM_RECOMPUTE:
                recompute(cfg, model)
            freeze_norm(cfg, model)
            network = _distributed(model, device)  # which parameters are trained may have changed
            if average:
                freeze_norm(cfg, average.average.module)
            logger.info("from iteration %d on, %s", iteration, describe_normalization(cfg, model))
        began = time.perf_counter()
        images, targets = to_device(next(batches), device)
        data_seconds = time.perf_counter() - began

        rate = learning_rate(cfg, iteration)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        losses: dict[str, float] = {}
        for k in range(solver.ACCUMULATE):
            part = slice(k * size, (k + 1) * size)
            with _only_here(network) if k < solver.ACCUMULATE - 1 else contextlib.nullcontext():
                with torch.autocast(device.type, dtype=amp, enabled=solver.AMP.ENABLED):
                    output = _losses(cfg, network, images[part], targets[part])
                for name, value in _finite("loss", output, iteration, targets[part]).items():
                    losses[name] = losses.get(name, 0.0) + value / solver.ACCUMULATE
                scaler.scale(sum(output.values()) / solver.ACCUMULATE).backward()
        scaler.unscale_(optimizer)
        norm = clip_gradients(cfg, model)
        if not scaler.is_enabled():  # which skips the steps whose gradients overflow, and lowers its scale
            _finite("gradient", {"norm": norm}, iteration, targets)
        scaler.step(optimizer)
        scaler.update()
        if average:
            average.update(model, iteration)

        done = iteration + 1
        log.step(done, losses, rate, time.perf_counter() - began, data_seconds)
        if done == solver.MAX_ITER and cfg.TEST.RECOMPUTE.IN_CHECKPOINT:
            recompute(cfg, model)
        if done == solver.MAX_ITER or done % solver.CHECKPOINT_PERIOD == 0:
            weights = [value for value in model.state_dict().values() if value.is_floating_point()]
            _finite("model", {"norm of its weights": nn.utils.get_total_norm(weights)}, iteration, targets)
            name = "model_final.pth" if done == solver.MAX_ITER else f"model_{done:07d}.pth"
            save_training(cfg, name, model, optimizer, scaler, done, average)
        if cfg.TEST.EVAL_PERIOD and done % cfg.TEST.EVAL_PERIOD == 0 and done < solver.MAX_ITER:
            log.evaluation(done, evaluate(cfg, average.model(cfg, model) if average else model))

    del batches  # ends its worker processes
    merge_population_statistics(model)  # what is returned is what was saved, on every rank
    if average:
        model = average.model(cfg, model)
        save_model(cfg, "model_averaged.pth", model)
    if cfg.DATASETS.TEST:
        log.evaluation(solver.MAX_ITER, evaluate(cfg, model))
    log.close()
    return model


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _distributed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, wrapped where there are several processes."""
    if world_size() == 1:
        return model
    network = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    network.broadcast_buffers = False  # here, because torch 2.13 renamed the argument
    return network


def _first_backward(cfg: CfgNode, network: nn.Module, device: torch.device, start: int) -> None:
    """One that counts for nothing. DDP sums gradients in another order after its first one, as the stopped run did."""
    with contextlib.closing(train_loader(cfg, rank=rank(), world_size=world_size(), start_iteration=start)) as batches:
        images, targets = to_device(next(batches), device)
    size, amp = images_per_forward(cfg, world_size()), cfg.SOLVER.AMP
    with torch.autocast(device.type, dtype=getattr(torch, amp.DTYPE), enabled=amp.ENABLED):
        losses = _losses(cfg, network, images[:size], targets[:size])
    torch.stack(list(losses.values())).sum().backward()
    network.zero_grad()


def _losses(cfg: CfgNode, network: nn.Module, images: list[Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Of one forward pass; its last `SOLVER.VIRTUAL_BATCH` images take part in the statistics alone."""
    own = len(images) - cfg.SOLVER.VIRTUAL_BATCH
    model = network.module if isinstance(network, DistributedDataParallel) else network
    follow_batches = any(isinstance(m, DomainBatchNorm) and not m.frozen for m in model.modules())
    virtual = own < len(images) and follow_batches
    with virtual_batch(model, images[own:], targets[own:]) if virtual else contextlib.nullcontext():
        losses: dict[str, Tensor] = network(images[:own], targets[:own])
    return losses


def _only_here(network: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Gradients of this block stay on this rank; the next ones carry them along to the others."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()


def _finite(what: str, tensors: dict[str, Tensor], iteration: int, targets: list[dict[str, Any]]) -> dict[str, float]:
    """Numbers of the loss, gradient or model, in one copy from the device; refused before they do harm."""
    values = dict(zip(tensors, torch.stack([v.detach().float() for v in tensors.values()]).tolist(), strict=True))
    if all(math.isfinite(value) for value in values.values()):
        return values
    shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
    files = ", ".join(str(target.get("file_name", target.get("image_id"))) for target in targets)
    raise UserError(
        f"the {what} is not finite at iteration {iteration + 1}: {shown}; images of rank {rank()}: {files}; "
        "lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or enable SOLVER.CLIP_GRADIENTS"
    )
