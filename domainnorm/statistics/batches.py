"""Batches of samples, whatever form they have: how many samples they are of, and the same samples in other batches."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def batch_size(batch: Any) -> int:
    """How many samples a batch has: N of a tensor `(N, …)`, the length of a list of images; else as its first item."""
    if isinstance(batch, Tensor) and batch.ndim:
        return len(batch)
    items = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(items, (list, tuple)) or not items:
        return 1
    if isinstance(batch, list) and all(isinstance(item, Tensor) and item.ndim == 3 for item in items):
        return len(items)
    inner = [item for item in items if isinstance(item, (Tensor, Mapping, list, tuple))]
    return batch_size(inner[0]) if inner else len(items)


def regrouped(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """The samples of `batches`, in order, in batches of `size`; the last one has those that are left.

    Args:
        batches: tensors `(N, …)`, lists with an item for each sample, and tuples, lists and dicts of such.

    Raises:
        ValueError: a batch with something else in it.
    """
    parts: list[Any] = []
    missing = size
    for batch in batches:
        begin, samples = 0, batch_size(batch)
        while begin < samples:
            end = min(begin + missing, samples)
            parts.append(_cut(batch, begin, end, samples))
            missing -= end - begin
            begin = end
            if not missing:
                yield _joined(parts)
                parts, missing = [], size
    if parts:
        yield _joined(parts)


def _cut(batch: Any, begin: int, end: int, samples: int) -> Any:
    """Some samples of a batch that has so many."""
    if isinstance(batch, Tensor) and batch.ndim and len(batch) == samples:
        return batch[begin:end]
    if isinstance(batch, Mapping):
        return {key: _cut(value, begin, end, samples) for key, value in batch.items()}
    if isinstance(batch, list) and len(batch) == samples and _are_samples(batch):
        return batch[begin:end]
    if isinstance(batch, (list, tuple)):
        return type(batch)(_cut(value, begin, end, samples) for value in batch)
    raise ValueError(
        f"samples_per_batch: expected tensors and lists of {samples} samples, got {type(batch).__name__} in a batch: "
        "make batches of that size yourself"
    )


def _are_samples(items: list[Any]) -> bool:
    """Whether a list has an item for each sample: images, or what is said of each."""
    images = [isinstance(item, Tensor) and item.ndim == 3 for item in items]
    return all(images) or not any(isinstance(item, Tensor) for item in items)


def _joined(parts: list[Any]) -> Any:
    """Parts of batches as one batch."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, list) and _are_samples(first):
        return [item for part in parts for item in part]
    return type(first)(_joined(list(values)) for values in zip(*parts, strict=True))
