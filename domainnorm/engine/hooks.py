"""What others do within a run, as detectron2's hooks: before and after it, and each of its steps."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from ..errors import UserError
from .log import TrainingLog

STAGES = ("before_train", "before_step", "after_step", "after_train")


class Trainer:
    """A training run, as hooks see it.

    Attributes:
        cfg: config of the run.
        model: not wrapped for several processes; its norms' running statistics are those of this rank.
        optimizer: optimizer of the run.
        iter: number of the current step, from 0; in `before_train`, of the first step; in `after_train`, the number of
            steps completed.
        start_iter, max_iter: where this process started, and where the run ends.
        losses: the losses of the current step by name, on this rank; with `SOLVER.ACCUMULATE` their mean.
    """

    def __init__(
        self, cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer, start_iter: int, log: TrainingLog
    ) -> None:
        self.cfg = cfg
        self.model = model
        self.optimizer = optimizer
        self.iter = self.start_iter = start_iter
        self.max_iter: int = cfg.SOLVER.MAX_ITER
        self.losses: dict[str, float] = {}
        self._log = log

    def put_scalar(self, name: str, value: float) -> None:
        """Log a number in the next line of the log, `metrics.json` and TensorBoard; several values are averaged."""
        self._log.put_scalar(name, value)


class HookBase:
    """Base class for hooks, whose methods do nothing. Any object with one or more of these methods is a hook.

    Hooks that change the model or draw random numbers must depend on `trainer.iter` alone: a hook's own attributes are
    not saved in checkpoints, and a resumed run starts with new ones.

    Attributes:
        trainer: the run; set before the first call.

    Example::

        >>> class Watch(dn.HookBase):
        ...     def after_step(self):
        ...         weights = nn.utils.parameters_to_vector(self.trainer.model.parameters())
        ...         self.trainer.put_scalar("norm_of_weights", weights.norm())
        >>> model = dn.train(cfg, hooks=[Watch()])  # doctest: +SKIP
    """

    trainer: Trainer

    def before_train(self) -> None:
        """Called before the first step of this process."""

    def before_step(self) -> None:
        """Called before the data of a step is loaded."""

    def after_step(self) -> None:
        """Called after the optimizer's step, before logging, checkpoint and evaluation, if these are due."""

    def after_train(self) -> None:
        """Called after the last evaluation, also after an error or Ctrl-C."""


class Hooks:
    """Those of a run, called in their order.

    Args:
        hooks: each with one or more methods of `HookBase`, or a function of the `Trainer`, called after each step.

    Raises:
        UserError: one is neither.
    """

    def __init__(self, hooks: Sequence[Any]) -> None:
        self.hooks: list[Any] = []
        for hook in hooks:
            if isinstance(hook, type) or not (callable(hook) or any(hasattr(hook, stage) for stage in STAGES)):
                raise UserError(
                    f"hooks take functions of the trainer, or objects with one of {', '.join(STAGES)}; got {hook!r}"
                )
            self.hooks.append(hook)
        self.trainer: Trainer | None = None

    def begin(self, trainer: Trainer) -> None:
        """Tell all hooks of the run, then `before_train`."""
        self.trainer = trainer
        for hook in self.hooks:
            if any(hasattr(hook, stage) for stage in STAGES):
                hook.trainer = trainer
        self.call("before_train")

    def call(self, stage: str) -> None:
        """All hooks that have something to do then."""
        for action in self._actions(stage) if self.trainer else ():
            action()

    def _actions(self, stage: str) -> Iterator[Callable[[], Any]]:
        for hook in self.hooks:
            if any(hasattr(hook, other) for other in STAGES):
                if hasattr(hook, stage):
                    yield getattr(hook, stage)
            elif stage == "after_step":
                yield partial(hook, self.trainer)
