"""What a model returns, as tensors that can be compared between two passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Outputs = list[Tensor]


def tensors_in(output: Any) -> Outputs:
    """The floating point tensors in what a model returns, in their order; of detections the scores alone.

    Boxes of two passes have no order in common, but sorted scores can be compared.
    """
    if isinstance(output, Tensor):
        return [output.detach().float()] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        if "scores" in output and "boxes" in output:
            return tensors_in(output["scores"])
        return [tensor for value in output.values() for tensor in tensors_in(value)]
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [tensor for value in output for tensor in tensors_in(value)]
    inner = vars(output) if hasattr(output, "__dict__") else {}
    return [tensor for value in inner.values() for tensor in tensors_in(value)]


def confidence(output: Any) -> float:
    """How sure a model is of what it returns, the mean over its samples; nan where that is not clear.

    The largest probability of logits `(N, K, *)`, or of one `(N,)` or `(N, 1)`; of detections the sum of an image's
    scores.
    """
    if isinstance(output, Tensor):
        if not output.is_floating_point() or not output.numel():
            return float("nan")
        logits = output.detach().float()
        if logits.ndim > 1 and logits.shape[1] > 1:
            return float(logits.softmax(1).amax(1).mean())
        return float(logits.abs().sigmoid().mean())
    if isinstance(output, Mapping):
        if "scores" in output and "boxes" in output:
            return float(output["scores"].sum())
        output = list(output.values())
    if not isinstance(output, (list, tuple)):
        output = list(vars(output).values()) if hasattr(output, "__dict__") else []
    if output and all(isinstance(value, Mapping) for value in output):
        return sum(map(confidence, output)) / len(output)
    found = (confidence(value) for value in output if isinstance(value, (Tensor, Mapping, list, tuple)))
    return next((value for value in found if value == value), float("nan"))


class Change:
    """The relative change of outputs, over several passes; add pairs, then read.

    Each tensor counts alike, whatever its scale is.
    """

    def __init__(self) -> None:
        self._changed: dict[int, float] = {}
        self._size: dict[int, float] = {}

    def add(self, one: Outputs, other: Outputs) -> None:
        """The outputs of one batch in both passes."""
        if len(one) != len(other):
            return
        for k, (a, b) in enumerate(zip(one, other, strict=True)):
            if a.shape != b.shape:
                if a.ndim != 1 or b.ndim != 1:
                    continue
                a, b = _sorted(a, max(len(a), len(b))), _sorted(b, max(len(a), len(b)))
            self._changed[k] = self._changed.get(k, 0.0) + float((a - b).double().square().sum())
            self._size[k] = self._size.get(k, 0.0) + float(a.double().square().sum())

    def __bool__(self) -> bool:
        return any(size > 0 for size in self._size.values())

    @property
    def square(self) -> float:
        """The mean square; nan where nothing was compared."""
        ratios = [self._changed[k] / size for k, size in self._size.items() if size > 0]
        return sum(ratios) / len(ratios) if ratios else float("nan")

    @property
    def value(self) -> float:
        """The root of it."""
        return self.square**0.5


def _sorted(values: Tensor, length: int) -> Tensor:
    """From the largest on, with zeros to that length."""
    return torch.nn.functional.pad(values.sort(descending=True).values, (0, length - len(values)))


def of_samples(outputs: Outputs, samples: int) -> Tensor | None:
    """One row `(samples, …)` for each sample, of outputs whose first dimension is that of the samples."""
    rows = [tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None] for tensor in outputs if len(tensor) == samples]
    return torch.cat(rows, 1) if rows else None
