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
        batches: tensors `(N, …)`, lists with an item for each sample, and tuples, lists and dicts of such, all of the
            form of the first.

    Raises:
        ValueError: a batch with something else in it, of another form than the first, or whose form is not clear.
    """
    form: Any = None
    parts: list[Any] = []
    missing = size
    for batch in batches:
        begin, samples = 0, batch_size(batch)
        if form is None:
            form = _form(batch, samples)
        while begin < samples:
            end = min(begin + missing, samples)
            parts.append(_cut(batch, form, begin, end, samples))
            missing -= end - begin
            begin = end
            if not missing:
                yield _joined(parts, form)
                parts, missing = [], size
    if parts:
        yield _joined(parts, form)


_ROWS, _ITEMS = "a tensor with a row for each sample", "a list with an item for each sample"


def _form(batch: Any, samples: int) -> Any:
    """`_ROWS` or `_ITEMS`, or a dict or list of the forms of what is in the batch."""
    if isinstance(batch, Tensor) and batch.ndim and len(batch) == samples:
        return _ROWS
    if isinstance(batch, Mapping):
        return {key: _form(value, samples) for key, value in batch.items()}
    if isinstance(batch, list) and len(batch) == samples and _are_samples(batch):
        return _ITEMS
    if isinstance(batch, (list, tuple)):
        return [_form(value, samples) for value in batch]
    raise ValueError(
        f"samples_per_batch: expected tensors and lists of {samples} samples, got {type(batch).__name__} in a batch: "
        "make batches of that size yourself"
    )


def _are_samples(items: list[Any]) -> bool:
    """Whether a list has an item for each sample, images or what is said of each, and is no pair of inputs and targets.

    Raises:
        ValueError: it may be either.
    """
    if any(isinstance(item, (list, tuple)) for item in items):
        return False
    tensors = [item for item in items if isinstance(item, Tensor)]
    if len(tensors) < len(items) or all(item.ndim == 3 for item in tensors):
        return True
    if all(item.ndim and len(item) == len(items) for item in tensors):
        raise ValueError(
            f"samples_per_batch: a list of {len(items)} tensors with {len(items)} rows each may be as many samples, or "
            "inputs and targets: give tuples for the latter, or make batches of that size yourself"
        )
    return True


def _cut(batch: Any, form: Any, begin: int, end: int, samples: int) -> Any:
    """Some samples of a batch that has so many."""
    if form in (_ROWS, _ITEMS):
        if not isinstance(batch, Tensor if form == _ROWS else list) or len(batch) != samples:
            raise ValueError(f"samples_per_batch: expected {form}, {samples} of them, got {type(batch).__name__}")
        return batch[begin:end]
    if isinstance(form, dict):
        return {key: _cut(batch[key], own, begin, end, samples) for key, own in form.items()}
    cut = [_cut(value, own, begin, end, samples) for value, own in zip(batch, form, strict=True)]
    return _rebuilt(batch, cut)


def _joined(parts: list[Any], form: Any) -> Any:
    """Parts of batches as one batch."""
    if form == _ROWS:
        if len(shapes := {tuple(part.shape[1:]) for part in parts}) > 1:
            raise ValueError(
                f"samples_per_batch: samples of different sizes, {sorted(shapes)}, do not fit into one tensor: give "
                "lists of samples, or batches of one size"
            )
        return torch.cat(parts)
    if form == _ITEMS:
        return [item for part in parts for item in part]
    if isinstance(form, dict):
        return {key: _joined([part[key] for part in parts], own) for key, own in form.items()}
    return _rebuilt(parts[0], [_joined(list(values), own) for own, *values in zip(form, *parts, strict=True)])


def _rebuilt(batch: Any, values: list[Any]) -> Any:
    """`values` in a list, a tuple or a named tuple, as `batch` is."""
    return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
