"""Training: one loop, in plain sight."""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..config import iteration_of, save_config
from ..data import by_name, own_sets, train_loader, training_sets
from ..data.classes import known_classes, with_classes
from ..data.sampler import images_per_forward
from ..distributed import get_device, rank, set_progress, to_device, world_size
from ..errors import Stopped, UserError
from ..evaluation import evaluate, recompute, write_report
from ..modeling import build_model
from ..modeling.channels_last import ChannelsLast
from ..modeling.description import class_names_in
from ..statistics.merge import merge_population_statistics
from .audit import TrainingAudit
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
from .describe_data import describe_data, draw_data
from .environment import describe_run
from .folder import RunFolder
from .freeze import freeze_norm
from .hooks import Hooks, Trainer
from .log import FILE_ONLY, TrainingLog, logged_end, setup_logging
from .optim import build_optimizer, clip_gradients, learning_rate, warn_about_schedule
from .step import check_finite, distributed, first_backward, losses_of, only_here
from .stop import StopSignals, signals_blocked
from .streams import tolerant_streams
from .try_smallest import try_smallest

logger = logging.getLogger(__name__)


def train(
    cfg: CfgNode,
    *,
    resume: bool = False,
    model: nn.Module | None = None,
    train_data: Dataset[Any] | Sequence[Dataset[Any]] | None = None,
    transforms: Callable[..., Any] | None = None,
    hooks: Sequence[Any] = (),
) -> nn.Module:
    """Train the model of `cfg`, on every rank, and write checkpoints, logs and results to `cfg.OUTPUT_DIR`.

    Ctrl-C or SIGTERM finishes the current step and saves. A second Ctrl-C ends the process immediately.

    Args:
        cfg: from `load_config`.
        resume: continue from the last checkpoint in `OUTPUT_DIR`, or start if there is none. With the same number of
            processes, on a device with deterministic kernels (a CPU), the result is bitwise that of an uninterrupted
            run. With another number of processes, the run continues at the same step and place in the data.
        model: trained, from its current weights, instead of the config's model. In training mode,
            `model(images, targets)` returns a dict of losses, whose sum is minimized; for eval mode see `evaluate`.
        train_data: instead of `DATASETS.TRAIN`: one or several data sets, with `len(dataset)`, whose `dataset[i]` is
            `(image, target)`: floats (3, H, W), and a dict of what the model takes. Random numbers must come from
            torch's generator, which is seeded for each sample. If it has `sizes`, the (height, width) of each image,
            batches do not mix wide and tall images.
        transforms: `(image, target) -> (image, target)` for all training images, instead of the config's, after those
            of `train_data`; for a classifier's own data sets `image -> image`. Seeded like `train_data`.
        hooks: functions of a trainer, called after each step, or objects with some of the methods of `HookBase`.

    Returns:
        The trained model, or the average of its weights with `SOLVER.AVERAGE_WEIGHTS`, without the wrapper for several
        processes. Its running statistics are those of all ranks.

    Raises:
        UserError: anything the user can fix: contradictory options; an `OUTPUT_DIR` that is not writable, in use by
            another run or, without `resume`, that holds an earlier run; a checkpoint that is broken or from another
            run; a loss, gradient or weight that is not finite (existing checkpoints are kept).
        Stopped: a `SystemExit`, after Ctrl-C or SIGTERM.

    Example::

        >>> model = dn.train(dn.load_config("quickstart.yaml"))  # doctest: +SKIP
        >>> model = dn.train(cfg, model=fasterrcnn_resnet50_fpn(), train_data=MyDataset())  # doctest: +SKIP
    """
    called = Hooks(hooks)
    with contextlib.ExitStack() as stack:
        for context in (tolerant_streams(), logged_end()):
            stack.enter_context(context)
        return _train(cfg, resume, model, train_data, transforms, called, stack)


def _train(
    cfg: CfgNode,
    resume: bool,
    own_model: nn.Module | None,
    train_data: Any,
    transforms: Callable[..., Any] | None,
    hooks: Hooks,
    stack: contextlib.ExitStack,
) -> nn.Module:
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
    cfg = _with_classes(cfg, class_names_in(checkpoint, file) if checkpoint else [])
    ranks: dict[str, Any] = {"rank": rank(), "world_size": world_size()}
    datasets = training_sets(cfg, transforms) if train_data is None else own_sets(train_data, transforms)
    make_batches = partial(train_loader, cfg, **ranks, start_iteration=start, datasets=datasets)
    batches = stack.enter_context(contextlib.closing(make_batches()))
    tests = check_test_sets(cfg)
    seed_generators(cfg.SEED)  # the same weights on every rank
    model = (build_model(cfg) if own_model is None else own_model.to(device)).train()
    if isinstance(model, ChannelsLast):
        model.weights_last = device.type == "cpu" and world_size() == 1
    check_model(cfg, model)
    try_smallest(cfg, model, datasets)
    optimizer = build_optimizer(cfg, model)
    scaler = torch.amp.GradScaler(device.type, enabled=solver.AMP.ENABLED and amp == torch.float16)
    frozen_at = iteration_of(cfg, solver.FREEZE_NORM_AT) if solver.FREEZE_NORM_AT else solver.MAX_ITER
    if frozen_at < start:
        freeze_norm(cfg, model)
    average = WeightAverage(cfg, model, datasets) if solver.AVERAGE_WEIGHTS else None
    if checkpoint and file:
        check_training(checkpoint, file, model, optimizer, scaler, average)

    folder = run_folder.open()
    setup_logging(folder)
    if rank() == 0:
        save_config(cfg, folder / "config.yaml")
    weights = file or (cfg.MODEL.WEIGHTS if own_model is None else f"those of the {type(own_model).__name__} given")
    for line in describe_run(cfg, device, weights):
        logger.info("%s", line)
    if loaded := getattr(model, "loaded", ""):
        logger.info("%s", loaded, extra=FILE_ONLY)  # the console has it
    warn_about_schedule(cfg)
    network = distributed(model, device)
    seed_generators(cfg.SEED + rank())
    if checkpoint and file:
        if world_size() > 1:
            first_backward(cfg, network, device, make_batches())
        restore_training(checkpoint, file, model, optimizer, scaler, average, seed=cfg.SEED)
    del checkpoint  # as large as the model and its optimizer
    log = TrainingLog(folder, start, solver.MAX_ITER, device)
    audit = TrainingAudit(cfg, model, optimizer, log)
    logger.info("%s", describe_normalization(cfg, model))
    if rank() == 0:
        report = describe_data(cfg, model, datasets, tests)
        for level, line in [(logging.INFO, report.text), *((logging.WARNING, text) for text in report.warnings)]:
            logger.log(level, "%s", line)
        draw_data(report, folder)
        if not cfg.DATASETS.TEST:
            logger.warning("DATASETS.TEST is empty: nothing will be evaluated, and there will be no report.html")
    logger.info("training from iteration %d to %d on %s, %d processes", start, solver.MAX_ITER, device, world_size())

    if 0 < start < solver.MAX_ITER and _is_due(cfg.TEST.EVAL_PERIOD, start):
        _score(cfg, model, average, start, log, datasets)  # the run may have been killed while it did
    stop.saved, stop.later = start, True
    stack.callback(hooks.call, "after_train")
    trainer = Trainer(cfg, model, optimizer, start, log)
    hooks.begin(trainer)
    for iteration in range(start, solver.MAX_ITER):
        if iteration == frozen_at:
            if solver.FREEZE_NORM_RECOMPUTE:
                recompute(cfg, model, datasets)
            freeze_norm(cfg, model)
            network = distributed(model, device)  # which parameters are trained may have changed
            if average:
                freeze_norm(cfg, average.average.module)
            logger.info("from iteration %d on, %s", iteration, describe_normalization(cfg, model))
        began = time.perf_counter()
        trainer.iter = iteration
        hooks.call("before_step")
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
            with only_here(network) if k < solver.ACCUMULATE - 1 else contextlib.nullcontext():
                with torch.autocast(device.type, dtype=amp, enabled=solver.AMP.ENABLED):
                    output = losses_of(cfg, network, images[part], targets[part])
                set_progress(3 * iteration + 2)
                for name, value in check_finite("loss", output, iteration, targets[part]).items():
                    losses[name] = losses.get(name, 0.0) + value / solver.ACCUMULATE
                scaler.scale(sum(output.values()) / solver.ACCUMULATE).backward()
        scaler.unscale_(optimizer)
        norm = clip_gradients(cfg, model)
        if not scaler.is_enabled():  # which skips the steps whose gradients overflow, and lowers its scale
            check_finite("gradient", {"norm": norm}, iteration, targets)
        scaler.step(optimizer)
        scaler.update()
        if average:
            average.update(model, iteration)

        done = iteration + 1
        set_progress(None)
        trainer.losses = losses
        hooks.call("after_step")
        log.step(done, losses, rate, time.perf_counter() - began, data_seconds)
        if _is_due(cfg.TEST.AUDIT_PERIOD, done):
            audit(done, images, targets)
        last, signal_number = done == solver.MAX_ITER, stop.number(device)
        if last and cfg.TEST.RECOMPUTE.IN_CHECKPOINT:
            recompute(cfg, model, datasets)
        evaluated = _is_due(cfg.TEST.EVAL_PERIOD, done) and not last
        if last or evaluated or signal_number or _is_due(checkpoint_period(cfg), done):
            weights = [value for value in model.state_dict().values() if value.is_floating_point()]
            check_finite("model", {"norm of its weights": nn.utils.get_total_norm(weights)}, iteration, targets)
            name = "model_final.pth" if last else f"model_{done:07d}.pth"
            save_training(cfg, name, model, optimizer, scaler, done, average)
            stop.saved = done
        if signal_number:
            raise Stopped(signal_number)
        if evaluated:
            with stop.at_once():
                _score(cfg, model, average, done, log, datasets)

    stop.later = False
    trainer.iter = solver.MAX_ITER
    batches.close()  # ends its worker processes
    merge_population_statistics(model)  # what is returned is what was saved, on every rank
    if average:
        model = average.model(cfg, model)
        save_model(cfg, "model_averaged.pth", model)
    if cfg.DATASETS.TEST:
        _score(cfg, model, None, solver.MAX_ITER, log, datasets)
    log.close()
    write_report(cfg)
    return model


def _with_classes(cfg: CfgNode, names: list[str]) -> CfgNode:
    """What the config says of classes, else `names`, of a run that goes on, else those of the training sets."""
    if not cfg.MODEL.CLASS_NAMES and not names and not cfg.DATASETS.TRAIN:
        return cfg  # which the loader refuses
    return with_classes(cfg, cfg.MODEL.CLASS_NAMES or names or known_classes(cfg))


def _is_due(period: int, done: int) -> bool:
    return period > 0 and done % period == 0


def _score(
    cfg: CfgNode,
    model: nn.Module,
    average: WeightAverage | None,
    done: int,
    log: TrainingLog,
    train_data: Sequence[Any],
) -> None:
    """Evaluate after `done` steps, and keep the best model; nothing where a run that was resumed had done so."""
    sets = list(by_name(cfg.DATASETS.TEST)) if len(cfg.DATASETS.TEST) > 1 else [""]
    if log.evaluated(done, [f"{name}/{data_set}" for name in cfg.TEST.STATISTICS for data_set in sets]):
        logger.info("iteration %d is evaluated already: %s has the results", done, log.metrics)
        return
    if average:
        model = average.model(cfg, model)
    pictures: dict[str, Tensor] = {}
    results = evaluate(cfg, model, train_data=train_data, pictures=pictures)
    if cfg.TEST.EVAL_PERIOD and log.is_best(results):
        save_model(cfg, "model_best.pth", model)
    log.evaluation(done, results, pictures)
