#!/usr/bin/env python
"""The loss along the gradient at the steps of a training (*Ghost Normalization*, Figs. 4 and 5).

    tools/studies/landscape.py --config-file F [--out output/landscape] [--every 1] [--factors 0.25 0.5 …] [--seed 0]
        [KEY VALUE …]

At a step, the loss of its images is computed again at the weights that other learning rates would lead to,
`weights - rate · gradient`, for rates of FACTOR times the step's. The smallest and the largest of these losses bound
the band of the figure: the wider it is, the less the gradient tells, and the rougher the loss. The training itself is
not affected. Writes `results.json` and `landscape.png`.

For your own model, loop or data sets: `dn.train(cfg, model=…, train_data=…, hooks=[Landscape()])`, or
`losses_along_gradient(loss, model, rates)` after a `backward()`.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import domainnorm as dn
from domainnorm.output import output_folder, write_json
from domainnorm.statistics.preserve import preserve_state

FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # the paper's 0.1, 0.2, …, 0.8 at a learning rate of 0.4


@torch.no_grad()
def losses_along_gradient(loss: Callable[[], Tensor], model: nn.Module, rates: Sequence[float]) -> list[float]:
    """`loss()` where each of `rates` leads from the weights of `model`, along its gradients; the model stays as it is.

    Random numbers are the same for each rate.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    before = [parameter.clone() for parameter in parameters]
    losses = []
    try:
        for rate in rates:
            for parameter, value, gradient in zip(parameters, before, gradients, strict=True):
                parameter.copy_(value).sub_(gradient, alpha=rate)
            with preserve_state(model), torch.random.fork_rng():
                losses.append(float(loss()))
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    return losses


class Landscape(dn.HookBase):
    """A hook of `dn.train` that measures every `every` steps; of one process, without `SOLVER.ACCUMULATE`.

    Attributes:
        losses: of each step that was measured (from 0), one loss for each of `factors`.
    """

    def __init__(self, factors: Sequence[float] = FACTORS, every: int = 1) -> None:
        self.factors = factors
        self.every = every
        self.losses: dict[int, list[float]] = {}
        self._batch: tuple[Any, ...] = ()
        self._measuring = False

    def before_train(self) -> None:
        self.trainer.model.register_forward_pre_hook(self._keep)
        self.trainer.optimizer.register_step_pre_hook(self._measure)

    def _keep(self, model: nn.Module, batch: tuple[Any, ...]) -> None:
        if model.training and not self._measuring:
            self._batch = batch

    def _measure(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self.trainer.iter % self.every:
            return
        model, rate = self.trainer.model, optimizer.param_groups[0]["lr"]
        self._measuring = True
        rates = [factor * rate for factor in self.factors]
        found = losses_along_gradient(lambda: sum(model(*self._batch).values()), model, rates)
        self.losses[self.trainer.iter] = found
        self._measuring = False


def summary(losses: dict[int, list[float]]) -> dict[str, Any]:
    """Smallest and largest loss of each step, their difference, and its means over the halves of the training."""
    smallest = {str(step): min(values) for step, values in losses.items()}
    largest = {str(step): max(values) for step, values in losses.items()}
    width = {step: largest[step] - smallest[step] for step in largest}
    values = list(width.values())
    half = len(values) // 2
    halves = {"first half": statistics.mean(values[: half or 1]), "second half": statistics.mean(values[half:])}
    return {"smallest": smallest, "largest": largest, "width": width | halves}


def draw(losses: dict[int, list[float]], title: str, file: Path) -> None:
    """The band between the smallest and the largest loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(list(losses), list(map(min, losses.values())), list(map(max, losses.values())), alpha=0.4)
    axes.set(title=title, xlabel="step", ylabel="loss along the gradient", yscale="log")
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The loss along the gradient at the steps of a training.")
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--out", default="output/landscape", help="folder of the results and of the training")
    parser.add_argument("--every", type=int, default=1, help="number of steps between measurements")
    parser.add_argument(
        "--factors", type=float, nargs="+", default=FACTORS, help="multiples of the step's learning rate"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="config options, which override those of FILE")
    args = parser.parse_intermixed_args(argv)  # run.py writes --seed and --out behind KEY VALUE
    try:
        if args.every < 1:
            raise dn.UserError(f"--every takes a positive number of steps, got {args.every}")
        cfg = dn.load_config(args.config_file, [*args.options, "SEED", args.seed, "OUTPUT_DIR", f"{args.out}/training"])
        if cfg.SOLVER.ACCUMULATE > 1:
            raise dn.UserError(f"the landscape is of one pass a step, got SOLVER.ACCUMULATE {cfg.SOLVER.ACCUMULATE}")
        landscape = Landscape(args.factors, args.every)
        dn.train(cfg, hooks=[landscape])
        folder = output_folder(args.out, "--out")
        draw(landscape.losses, cfg.MODEL.BACKBONE.NORM or "no norm", folder / "landscape.png")
        write_json(folder / "results.json", summary(landscape.losses))
    except dn.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
