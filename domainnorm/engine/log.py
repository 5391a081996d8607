"""The record of a training run: console and `log.txt`, `metrics.json`, TensorBoard."""

import json
import logging
import math
import resource
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from fvcore.common.history_buffer import HistoryBuffer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..distributed import gather_objects, rank
from ..errors import UserError
from ..output import replace_file

PERIOD = 20  # iterations from one line to the next; also how many a line averages

FILE_ONLY = {"file_only": True}  # `extra` of a record that the console shows otherwise, or not at all

logger = logging.getLogger(__name__)


def setup_logging(folder: str | Path | None = None) -> None:
    """Send this library's log, and warnings, to the console and to `folder/log.txt`.

    Of ranks other than 0, the console shows only warnings, and the file has only errors.
    """
    package = logging.getLogger("domainnorm")
    package.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    handlers: list[logging.Handler] = [_Console()]
    if folder is not None:
        handlers.append(_File(Path(folder) / "log.txt", encoding="utf-8", errors="backslashreplace", delay=True))
        handlers[-1].setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    for handler in handlers:
        who = "" if rank() == 0 else f"rank {rank()} "
        handler.setFormatter(logging.Formatter(f"[%(asctime)s] {who}%(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for logger in (package, logging.getLogger("py.warnings")):
        for handler in list(logger.handlers):  # of an earlier run in this process
            if isinstance(handler, (_Console, _File)):
                logger.removeHandler(handler)
                with suppress(OSError):  # what it could not write has been told then
                    handler.close()
        for handler in handlers:
            logger.addHandler(handler)


@contextmanager
def logged_end() -> Iterator[None]:
    """In this block, Python's warnings go to the log, and so does what ends it."""
    logging.captureWarnings(True)
    try:
        yield
    except Exception as error:
        ended = error if isinstance(error, UserError) else traceback.format_exc()
        with suppress(UserError):  # of a full disk
            logger.error("%s", ended, extra=FILE_ONLY)
        raise
    finally:
        logging.captureWarnings(False)


class _Console(logging.Handler):
    """Standard output, whatever it is when a line comes: standard error is for mistakes, and a pipe may be swapped."""

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "file_only"):
            print(self.format(record), flush=True)


class _File(logging.FileHandler):
    """`log.txt`. That it cannot be written is told as every other mistake, not by a traceback for each line."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError as error:
            raise UserError(f"{self.baseFilename}: cannot be written: {error.strerror}") from error

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # what is being handled


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
        self.scalars: dict[str, HistoryBuffer] = {}  # since the last line
        self.metrics = Path(folder) / "metrics.json"
        self.evaluations: dict[int, dict[str, float]] = {}
        if rank() == 0:
            for line in _keep_until(self.metrics, start):
                if any("/" in name for name in line):
                    self.evaluations.setdefault(line["iteration"], {}).update(line)
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
        histories = {**self.scalars, **self.history}
        ranks = gather_objects({name: history.avg(PERIOD) for name, history in histories.items()})
        self.scalars.clear()
        if rank() != 0:
            return
        of_ranks = {name: [r[name] for r in ranks if name in r] for name in dict.fromkeys(n for r in ranks for n in r)}
        metrics = {name: sum(found) / len(found) for name, found in of_ranks.items()}
        # the median forgives the first iterations and the odd pause for a checkpoint
        metrics["eta_seconds"] = self.history["time"].median(1000) * (self.last - iteration)
        metrics["lr"] = learning_rate
        metrics["max_memory_mb"] = self._max_memory() / 2**20
        self._write(iteration, metrics)
        logger.info(_line(iteration, self.last, metrics, list(losses)))

    def put_scalar(self, name: str, value: float) -> None:
        """Note a number for the next line."""
        self.scalars.setdefault(name, HistoryBuffer(max_length=PERIOD)).update(float(value))

    def evaluated(self, iteration: int, beginnings: Sequence[str]) -> bool:
        """Whether the record has metrics of `iteration` whose names begin with each of `beginnings`; on every rank."""
        found = self.evaluations.get(iteration, {})
        return gather_objects(all(any(name.startswith(start) for name in found) for start in beginnings))[0]

    def is_best(self, results: dict[str, Any]) -> bool:
        """Whether the first metric of `results` is above those of all evaluations before; on every rank."""
        name, value = _leaves(results)[0]
        before = [line[name] for line in self.evaluations.values() if line.get(name) is not None]
        return gather_objects(not math.isnan(value) and all(value > other for other in before))[0]

    def evaluation(self, iteration: int, results: dict[str, Any], pictures: Mapping[str, Tensor] | None = None) -> None:
        """Note what `evaluate` returned, and show `pictures` of it, uint8 (3, H, W), in TensorBoard."""
        if rank() == 0:
            metrics = dict(_leaves(results))
            for tag, picture in (pictures or {}).items():
                self.tensorboard.add_image(tag, picture, iteration)
            self._write(iteration, metrics)
            self.evaluations.setdefault(iteration, {}).update(_finite(metrics))
            shown = "  ".join(
                f"{name} {value:.2f}" for name, value in metrics.items() if name.endswith(("/AP", "/top1"))
            )
            logger.info("iteration %d/%d  %s", iteration, self.last, shown)

    def write(self, iteration: int, metrics: dict[str, float], text: str) -> None:
        """Note other numbers of one step at once, and a line of `text` about them."""
        if rank() == 0:
            self._write(iteration, metrics)
            logger.info("iteration %d/%d  %s", iteration, self.last, text)

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
        try:
            with open(self.metrics, "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"iteration": iteration, **_finite(metrics)}) + "\n")
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, iteration)
            self.tensorboard.flush()
        except OSError as error:
            raise UserError(f"{self.metrics}: cannot be written: {error.strerror}") from error


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


def _finite(metrics: dict[str, float]) -> dict[str, Any]:
    """As JSON has them: None for nan."""
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}


def _keep_until(file: Path, iteration: int) -> list[dict[str, Any]]:
    """The lines of `file` up to `iteration`, and nothing else, stay in it."""
    if not file.exists():
        return []
    kept = []
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    for line in content.decode("utf-8", "replace").splitlines():
        try:
            entry = json.loads(line)
            if entry["iteration"] <= iteration:
                kept.append(entry)
        except (ValueError, KeyError, TypeError):  # the last line of a killed run
            continue
    with replace_file(file) as stream:
        stream.writelines(json.dumps(entry) + "\n" for entry in kept)
    return kept
