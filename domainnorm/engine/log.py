"""The record of a training run: console and `log.txt`, `metrics.json`, TensorBoard."""

import json
import logging
import math
import resource
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from fvcore.common.history_buffer import HistoryBuffer
from torch.utils.tensorboard import SummaryWriter

from ..distributed import gather_objects, rank
from ..output import replace_file

PERIOD = 20  # iterations from one line to the next; also how many a line averages

logger = logging.getLogger(__name__)


def setup_logging(folder: str | Path | None = None) -> None:
    """Send this library's log to the console and to `folder/log.txt`; of ranks other than 0, only warnings."""
    package = logging.getLogger("domainnorm")
    for handler in list(package.handlers):  # of an earlier run in this process
        package.removeHandler(handler)
        handler.close()
    package.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    handlers: list[logging.Handler] = [_Console()]
    if rank() == 0 and folder is not None:
        handlers.append(logging.FileHandler(Path(folder) / "log.txt", encoding="utf-8"))
    for handler in handlers:
        who = "" if rank() == 0 else f"rank {rank()} "
        handler.setFormatter(logging.Formatter(f"[%(asctime)s] {who}%(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        package.addHandler(handler)


class _Console(logging.Handler):
    """Standard output, whatever it is when a line comes: standard error is for mistakes, and a pipe may be swapped."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


class TrainingLog:
    """Writes what happens in a run into its output folder; every rank holds one, rank 0 writes.

    Iterations are counted as steps done, so the first is 1. What `metrics.json` and TensorBoard hold beyond
    `start` (of a run that went on after its last checkpoint, or of an earlier one) is dropped.

    Args:
        start: steps done before this process started.
        last: steps done when training ends.
    """

    def __init__(self, folder: str | Path, start: int, last: int, device: torch.device) -> None:
        self.last = last
        self.device = device
        self.history: dict[str, HistoryBuffer] = {}
        self.metrics = Path(folder) / "metrics.json"
        if rank() == 0:
            _keep_until(self.metrics, start)
            self.tensorboard = SummaryWriter(str(folder), purge_step=start + 1)

    def step(
        self, iteration: int, losses: dict[str, float], learning_rate: float, seconds: float, data_seconds: float
    ) -> None:
        """Note one step; every `PERIOD` steps, and after the last one, write a line."""
        values = {"total_loss": sum(losses.values()), **losses, "time": seconds, "data_time": data_seconds}
        for name, value in values.items():
            self.history.setdefault(name, HistoryBuffer(max_length=1000)).update(value)
        if iteration % PERIOD and iteration != self.last:
            return
        ranks = gather_objects({name: history.avg(PERIOD) for name, history in self.history.items()})
        if rank() != 0:
            return
        metrics = {name: sum(r[name] for r in ranks) / len(ranks) for name in values}
        # the median forgives the first iterations and the odd pause for a checkpoint
        metrics["eta_seconds"] = self.history["time"].median(1000) * (self.last - iteration)
        metrics["lr"] = learning_rate
        metrics["max_memory_mb"] = self._max_memory() / 2**20
        self._write(iteration, metrics)
        logger.info(_line(iteration, self.last, metrics, list(losses)))

    def evaluation(self, iteration: int, results: dict[str, Any]) -> None:
        """Note what `evaluate` returned."""
        if rank() == 0:
            metrics = dict(_leaves(results))
            self._write(iteration, metrics)
            shown = "  ".join(
                f"{name} {value:.2f}" for name, value in metrics.items() if name.endswith(("/AP", "/top1"))
            )
            logger.info("iteration %d/%d  %s", iteration, self.last, shown)

    def close(self) -> None:
        """Finish the files."""
        if rank() == 0:
            self.tensorboard.close()

    def _max_memory(self) -> int:
        """Bytes: the most that tensors took on the GPU or, on a CPU, that this process took."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def _write(self, iteration: int, metrics: dict[str, float]) -> None:
        with open(self.metrics, "a", encoding="utf-8") as stream:
            finite = {name: None if math.isnan(value) else value for name, value in metrics.items()}
            stream.write(json.dumps({"iteration": iteration, **finite}) + "\n")
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, iteration)
        self.tensorboard.flush()


def _line(iteration: int, last: int, metrics: dict[str, float], losses: list[str]) -> str:
    parts = [f"iteration {iteration}/{last}", f"eta {timedelta(seconds=int(metrics['eta_seconds']))}"]
    parts += [f"{name} {metrics[name]:.4g}" for name in ("total_loss", *losses)]
    parts += [f"time {metrics['time']:.3f}", f"data {metrics['data_time']:.3f}", f"lr {metrics['lr']:.3g}"]
    parts.append(f"memory {metrics['max_memory_mb']:.0f} MB")
    return "  ".join(parts)


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """`{"population": {"bbox": {"AP": 1.0}}}` as `[("population/bbox/AP", 1.0)]`."""
    leaves: list[tuple[str, float]] = []
    for name, value in tree.items():
        leaves += _leaves(value, f"{prefix}{name}/") if isinstance(value, dict) else [(prefix + name, value)]
    return leaves


def _keep_until(file: Path, iteration: int) -> None:
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
        except json.JSONDecodeError:  # the last line of a killed run
            continue
    with replace_file(file) as stream:
        stream.writelines(kept)
