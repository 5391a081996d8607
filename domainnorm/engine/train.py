"""Training: one loop, in plain sight."""

import contextlib
import logging
import math
import time
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..config import iteration_of, save_config
from ..data import by_name, train_loader
from ..data.sampler import images_per_forward
from ..distributed import get_device, rank, set_progress, to_device, world_size
from ..errors import Stopped, UserError
from ..evaluation import evaluate, recompute, write_report
from ..layers import DomainBatchNorm
from ..modeling import build_model
from ..modeling.channels_last import ChannelsLast
from ..statistics.merge import merge_population_statistics
from ..statistics.virtual_batch import virtual_batch
from .average import WeightAverage
from .check import check_model, check_test_sets
from .checkpoint import (
    checkpoint_period,
    last_checkpoint,
    read_training,
    restore_training,
    save_model,
    save_training,
    seed_generators,
)
from .checkpoint_check import check_training
from .describe import describe_normalization
from .environment import describe_run
from .folder import RunFolder
from .freeze import freeze_norm
from .log import TrainingLog, logged_end, setup_logging
from .optim import build_optimizer, clip_gradients, learning_rate, warn_about_schedule
from .stop import StopSignals, signals_blocked
from .streams import tolerant_streams
from .try_smallest import try_smallest

logger = logging.getLogger(__name__)


def train(cfg: CfgNode, *, resume: bool = False) -> nn.Module:
    """Train what `cfg` says, on every rank; into `cfg.OUTPUT_DIR` go checkpoints, logs and results.

    Ctrl-C or SIGTERM finishes the step and saves. A second Ctrl-C ends the process at once.

    Args:
        cfg: from `load_config`.
        resume: continue from the last checkpoint in `OUTPUT_DIR`, or start where there is none. The result equals
            that of a run that was never stopped, to the bit, on a device whose kernels are deterministic (a CPU), with
            as many processes; with another number of them it goes on at the same step and place in the data.

    Returns:
        The trained model, or the average of its weights if `SOLVER.AVERAGE_WEIGHTS`, not wrapped for several
        processes; its running statistics are those of all ranks.

    Raises:
        UserError: anything the user can mend: a contradiction in `cfg`, an `OUTPUT_DIR` that cannot be written, that
            another run has or, without `resume`, that holds an earlier one, a checkpoint of another run or a broken
            one; a loss, gradient or weight that is not finite (checkpoints stay as they were).
        Stopped: a `SystemExit`, after Ctrl-C or SIGTERM.

    Example::

        >>> model = dn.train(dn.load_config("quickstart.yaml"))  # doctest: +SKIP
    """
    with contextlib.ExitStack() as stack:
        for context in (tolerant_streams(), logged_end()):
            stack.enter_context(context)
        return _train(cfg, resume, stack)


def _train(cfg: CfgNode, resume: bool, stack: contextlib.ExitStack) -> nn.Module:
    run_folder, stop = stack.enter_context(RunFolder(cfg.OUTPUT_DIR)), stack.enter_context(StopSignals())
    solver = cfg.SOLVER
    device = get_device(cfg.MODEL.DEVICE)
    amp = getattr(torch, solver.AMP.DTYPE)
    if solver.AMP.ENABLED and amp == torch.float16 and device.type == "cpu":
        raise UserError("SOLVER.AMP.DTYPE 'float16' needs CUDA, and MODEL.DEVICE is a CPU here: use bfloat16")
    size = images_per_forward(cfg, world_size())

    # What can be wrong with the input shows before anything is written, and not after days of training.
    setup_logging()
    run_folder.claim(new=not resume)
    file = last_checkpoint(cfg.OUTPUT_DIR) if resume else None
    checkpoint = read_training(cfg, file) if file else None
    start = checkpoint["iteration"] if checkpoint else 0
    ranks = {"rank": rank(), "world_size": world_size()}
    batches = stack.enter_context(contextlib.closing(train_loader(cfg, **ranks, start_iteration=start)))
    check_test_sets(cfg)
    seed_generators(cfg.SEED)  # the same weights on every rank
    model = build_model(cfg).train()
    if isinstance(model, ChannelsLast):
        model.weights_last = device.type == "cpu" and world_size() == 1
    check_model(cfg, model)
    try_smallest(cfg, model)
    optimizer = build_optimizer(cfg, model)
    scaler = torch.amp.GradScaler(device.type, enabled=solver.AMP.ENABLED and amp == torch.float16)
    frozen_at = iteration_of(cfg, solver.FREEZE_NORM_AT) if solver.FREEZE_NORM_AT else solver.MAX_ITER
    if frozen_at < start:
        freeze_norm(cfg, model)
    average = WeightAverage(cfg, model) if solver.AVERAGE_WEIGHTS else None
    if checkpoint and file:
        check_training(checkpoint, file, model, optimizer, scaler, average)

    folder = run_folder.open()
    setup_logging(folder)
    if rank() == 0:
        save_config(cfg, folder / "config.yaml")
    for line in describe_run(cfg, device, file or cfg.MODEL.WEIGHTS):
        logger.info("%s", line)
    warn_about_schedule(cfg)
    network = _distributed(model, device)
    seed_generators(cfg.SEED + rank())
    if checkpoint and file:
        if world_size() > 1:
            _first_backward(cfg, network, device, start)
        restore_training(checkpoint, file, model, optimizer, scaler, average, seed=cfg.SEED)
    del checkpoint  # as large as the model and its optimizer
    log = TrainingLog(folder, start, solver.MAX_ITER, device)
    logger.info("%s", describe_normalization(cfg, model))
    logger.info("training from iteration %d to %d on %s, %d processes", start, solver.MAX_ITER, device, world_size())

    if 0 < start < solver.MAX_ITER and _is_due(cfg.TEST.EVAL_PERIOD, start):
        _score(cfg, model, average, start, log)  # the run may have been killed while it did
    stop.saved, stop.later = start, True
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
        set_progress(3 * iteration)
        with signals_blocked() if iteration == start else contextlib.nullcontext():  # it starts the worker processes
            images, targets = to_device(next(batches), device)
        data_seconds = time.perf_counter() - began
        set_progress(3 * iteration + 1)

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
                set_progress(3 * iteration + 2)
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
        set_progress(None)
        log.step(done, losses, rate, time.perf_counter() - began, data_seconds)
        last, signal_number = done == solver.MAX_ITER, stop.number(device)
        if last and cfg.TEST.RECOMPUTE.IN_CHECKPOINT:
            recompute(cfg, model)
        evaluated = _is_due(cfg.TEST.EVAL_PERIOD, done) and not last
        if last or evaluated or signal_number or _is_due(checkpoint_period(cfg), done):
            weights = [value for value in model.state_dict().values() if value.is_floating_point()]
            _finite("model", {"norm of its weights": nn.utils.get_total_norm(weights)}, iteration, targets)
            name = "model_final.pth" if last else f"model_{done:07d}.pth"
            save_training(cfg, name, model, optimizer, scaler, done, average)
            stop.saved = done
        if signal_number:
            raise Stopped(signal_number)
        if evaluated:
            with stop.at_once():
                _score(cfg, model, average, done, log)

    stop.later = False
    batches.close()  # ends its worker processes
    merge_population_statistics(model)  # what is returned is what was saved, on every rank
    if average:
        model = average.model(cfg, model)
        save_model(cfg, "model_averaged.pth", model)
    if cfg.DATASETS.TEST:
        _score(cfg, model, None, solver.MAX_ITER, log)
    log.close()
    write_report(cfg)
    return model


def _is_due(period: int, done: int) -> bool:
    return period > 0 and done % period == 0


def _score(cfg: CfgNode, model: nn.Module, average: WeightAverage | None, done: int, log: TrainingLog) -> None:
    """Evaluate after `done` steps, and keep the best model; nothing where a run that was resumed had done so."""
    sets = list(by_name(cfg.DATASETS.TEST)) if len(cfg.DATASETS.TEST) > 1 else [""]
    if log.evaluated(done, [f"{name}/{data_set}" for name in cfg.TEST.STATISTICS for data_set in sets]):
        logger.info("iteration %d is evaluated already: %s has the results", done, log.metrics)
        return
    if average:
        model = average.model(cfg, model)
    pictures: dict[str, Tensor] = {}
    results = evaluate(cfg, model, pictures=pictures)
    if cfg.TEST.EVAL_PERIOD and log.is_best(results):
        save_model(cfg, "model_best.pth", model)
    log.evaluation(done, results, pictures)


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
