"""The optimizer with its weight-decay groups, the learning rate of an iteration, gradient clipping."""

import logging
from typing import Any

import torch
from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import nn

from ..config import iteration_of
from ..errors import UserError
from ..layers import is_norm

logger = logging.getLogger(__name__)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """`SOLVER.OPTIMIZER` over the trainable parameters, each once, in groups of their weight decay.

    Parameters of norm layers decay by `WEIGHT_DECAY_NORM`, other biases by `WEIGHT_DECAY_BIAS`, the rest by
    `WEIGHT_DECAY`. A parameter shared by a norm layer and another module counts where it is met first. γ decays to
    `WEIGHT_DECAY_NORM_TARGET`.

    Raises:
        UserError: there is none.
    """
    solver = cfg.SOLVER
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # by decay and what it decays to
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            if is_norm(module):
                decay = solver.WEIGHT_DECAY_NORM
            elif name == "bias":
                decay = solver.WEIGHT_DECAY_BIAS
            else:
                decay = solver.WEIGHT_DECAY
            target = solver.WEIGHT_DECAY_NORM_TARGET if is_norm(module) and name == "weight" and decay else 0.0
            groups.setdefault((decay, target), []).append(parameter)
    parameters: list[dict[str, Any]] = [
        {"params": of_group, "weight_decay": decay, "decay_target": target}
        for (decay, target), of_group in groups.items()
    ]
    if not parameters:
        raise UserError(f"no parameter of the {type(model).__name__} requires a gradient: there is nothing to train")
    options: dict[str, Any] = {"lr": solver.BASE_LR}
    if solver.OPTIMIZER == "SGD":
        options |= {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    elif solver.OPTIMIZER == "RMSprop":
        options |= {"momentum": solver.MOMENTUM, "alpha": solver.RMSPROP_ALPHA, "eps": solver.OPTIMIZER_EPS}
    else:  # fused: on a CPU 5 times as fast as the default
        options |= {"betas": tuple(solver.ADAM_BETAS), "eps": solver.OPTIMIZER_EPS, "fused": True}
    optimizer: torch.optim.Optimizer = getattr(torch.optim, solver.OPTIMIZER)(parameters, **options)
    if solver.OPTIMIZER == "AdamW":
        optimizer.register_step_post_hook(_pull_to_target)
    else:
        optimizer.register_step_pre_hook(_pull_to_target)
    return optimizer


@torch.no_grad()
def _pull_to_target(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Decay to what is not 0, beside the optimizer's own to 0: through the gradient, AdamW's apart from it."""
    # Of a step that overflows, the loss scaler tells a fused optimizer, which then leaves the parameters as they are.
    overflow = getattr(optimizer, "found_inf", None)
    for group in optimizer.param_groups:
        pull = group["weight_decay"] * group.get("decay_target", 0.0)
        for parameter in group["params"] if pull else ():
            if parameter.grad is None:
                continue
            if not isinstance(optimizer, torch.optim.AdamW):
                parameter.grad.sub_(pull)
            else:
                parameter.add_(group["lr"] * pull * (1 if overflow is None else 1 - overflow.to(parameter.device)))


def learning_rate(cfg: CfgNode, iteration: int) -> float:
    """The learning rate of step `iteration`, counted from 0: the schedule times a linear warm-up. A pure function.

    Steps: `BASE_LR` times `GAMMA` for each of `STEPS` that was reached. Cosine: half a period, 0 at `MAX_ITER`. One
    cycle, shaped as torch's `OneCycleLR`: from a 25th of `BASE_LR` to it at `ONE_CYCLE_PEAK`, then to a 250000th.
    Warm-up: from `WARMUP_FACTOR` at 0 to 1 at `WARMUP_ITERS`; and again after norm layers are frozen.
    """
    solver = cfg.SOLVER
    schedule: ParamScheduler
    if solver.LR_SCHEDULER == "cosine":
        schedule = CosineParamScheduler(1.0, 0.0)
    elif solver.LR_SCHEDULER == "one_cycle":
        peak = solver.ONE_CYCLE_PEAK
        schedule = CompositeParamScheduler(
            [CosineParamScheduler(1 / 25, 1.0), CosineParamScheduler(1.0, 1 / 250_000)],
            [peak, 1 - peak],
            ["rescaled", "rescaled"],
        )
    else:
        steps = [step for step in solver.STEPS if step < solver.MAX_ITER]
        schedule = MultiStepParamScheduler(
            [solver.GAMMA**k for k in range(len(steps) + 1)], num_updates=solver.MAX_ITER, milestones=steps
        )
    rate = solver.BASE_LR * schedule(iteration / solver.MAX_ITER)
    frozen_at = iteration_of(cfg, solver.FREEZE_NORM_AT)
    for begin, length in ((0, solver.WARMUP_ITERS), (frozen_at, solver.FREEZE_NORM_WARMUP_ITERS)):
        if begin <= iteration < begin + length:
            rate *= LinearParamScheduler(solver.WARMUP_FACTOR, 1.0)((iteration - begin) / length)
    return rate


def warn_about_schedule(cfg: CfgNode) -> None:
    """Log what of the schedule this run is too short to reach."""
    solver = cfg.SOLVER
    if beyond := [step for step in solver.STEPS if step >= solver.MAX_ITER]:
        logger.warning("SOLVER.STEPS %s: never reached, SOLVER.MAX_ITER is %d", beyond, solver.MAX_ITER)
    for name in ("FREEZE_NORM_AT", "AVERAGE_WEIGHTS_FROM"):
        if iteration_of(cfg, solver[name]) >= solver.MAX_ITER:
            logger.warning("SOLVER.%s %g: never reached, SOLVER.MAX_ITER is %d", name, solver[name], solver.MAX_ITER)
    if solver.WARMUP_ITERS >= solver.MAX_ITER:
        logger.warning(
            "SOLVER.WARMUP_ITERS %d: the warm-up never ends, SOLVER.MAX_ITER is %d",
            solver.WARMUP_ITERS,
            solver.MAX_ITER,
        )


def clip_gradients(cfg: CfgNode, model: nn.Module) -> torch.Tensor:
    """Bound the gradients as `SOLVER.CLIP_GRADIENTS` says; returns the norm that all of them together had before."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip.ENABLED and clip.CLIP_TYPE == "norm":
        nn.utils.clip_grads_with_norm_(parameters, clip.CLIP_VALUE, norm)
    elif clip.ENABLED:
        nn.utils.clip_grad_value_(parameters, clip.CLIP_VALUE)
    return norm
