"""The built-in data set of a classifier, generated on first use: one shape on each small image."""

from pathlib import Path

import numpy as np

from .cache import cache_root, cached
from .scene import CLASSES, draw_patch

VERSION = 1  # to be raised when the pixels or labels change: the sets are cached under this number
COUNTS = {"patches_train": 4000, "patches_val": 1000}  # images


def patches_file(name: str, count: int | None = None) -> Path:
    """The `.npz` file of the set `name` (a key of `COUNTS`), generated if it is not there: `images`, `labels` and
    `class_names` as `read_npz` takes them.

    Args:
        count: images; by default `COUNTS`. Other counts are cached apart.

    Raises:
        UserError: the file cannot be written.
    """
    count = COUNTS[name] if count is None else count
    stem = name if count == COUNTS[name] else f"{name}-{count}"
    return cached(name, cache_root() / f"patches-v{VERSION}" / f"{stem}.npz", lambda draft: _write(draft, name, count))


def _write(file: Path, name: str, count: int) -> None:
    images, labels = [], []
    for index in range(count):
        # A stream for each image: a set of fewer images is the beginning of a longer one.
        rng = np.random.default_rng([list(COUNTS).index(name), index])
        labels.append(int(rng.integers(len(CLASSES))))
        images.append(draw_patch(labels[-1], rng))
    np.savez(file, images=np.stack(images), labels=np.array(labels, dtype=np.int64), class_names=np.array(CLASSES))
