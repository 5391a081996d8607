"""What a COCO file says, as arrays: read once, checked field by field, and used for training and evaluation alike."""

import copy
import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .json_lists import read_lists
from .masks import Segmentations
from .shared import shared
from .table import Table, check_unique

_LISTS = ("images", "annotations", "categories")
_MAX_SIDE = 2**20  # of an image, in pixels: no format of images has more, and sums of pixels do not overflow
_KEPT_FROM = 2**24  # bytes of a file that is not parsed again while it is as it was
_KEPT = 8  # such files


class Strings(Sequence[str]):
    """Strings in one array, which processes share: objects would be copied, by counting references to them."""

    def __init__(self, values: Iterable[str]) -> None:
        encoded = [value.encode(errors="surrogateescape") for value in values]
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(value) for value in encoded], dtype=np.int64)

        self.positions = np.arange(len(encoded))  # of those that are meant

    def at(self, positions: np.ndarray) -> "Strings":
        """Those at `positions`, which share the array."""
        chosen = copy.copy(self)
        chosen.positions = self.positions[positions]
        return chosen

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        position = self.positions[index]
        return (
            self.text[self.ends[position - 1] if position else 0 : self.ends[position]]
            .tobytes()
            .decode(errors="surrogateescape")
        )


@dataclass(frozen=True)
class Columns:
    """The fields of a COCO file of n images, m objects and k categories, in its order.

    Attributes:
        source: what they are of, for errors.
        categories: the entries, sorted by id; label l is the l-th.
        image_ids: int64 (n,).
        sizes: (height, width), int64 (n, 2).
        file_names, domains: of images; the domain is "" where there is none.
        ids: of objects, int64 (m,).
        images, labels: positions in `image_ids` and `categories`, int64 (m,).
        xywh: boxes as in the file, float64 (m, 4).
        areas: float64 (m,), NaN where there is none.
        crowds: bool (m,).
        segmentations: None if they were not asked for.
    """

    source: str
    categories: list[dict[str, Any]]
    image_ids: np.ndarray
    sizes: np.ndarray
    file_names: Strings
    domains: Strings
    ids: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    xywh: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray
    segmentations: Segmentations | None

    def size(self, image: int) -> tuple[int, int]:
        """Height and width of an image."""
        height, width = self.sizes[image].tolist()
        return height, width


def read_columns(file: Path, *, masks: bool = False) -> Columns:
    """What an annotation file says; of a large one, what was read is kept, and not read again while the file stays.

    Args:
        masks: whether to read the segmentations.

    Raises:
        UserError: missing or broken file or entry, id used twice, unknown image or category.
    """
    key = _identity(file)
    columns = _kept.pop(key, None)
    if columns is None or (masks and columns.segmentations is None):
        large = key[2] >= _KEPT_FROM
        columns = shared((*key, masks), lambda: _read(file, masks)) if large else _read(file, masks)
    if key[2] >= _KEPT_FROM:
        _kept[key] = columns
        for oldest in list(_kept)[:-_KEPT]:
            del _kept[oldest]
    return columns


def columns_of(contents: dict[str, Any], source: str, *, masks: bool = False) -> Columns:
    """The same of what such a file contains, whose images need no file names and, without `masks`, no sizes."""
    parts: dict[str, list[Any]] = {}
    shapes = Segmentations() if masks else None
    for kind in _LISTS:
        if type(contents.get(kind)) is not list:
            raise UserError(f'{source}: has no list "{kind}"; expected COCO\'s format')
        parts[kind] = [_fields(Table(source, kind, contents[kind]), shapes, from_file=False)]
    return _joined(source, parts, shapes)


_kept: dict[tuple[Path, int, int, int], Columns] = {}


def _identity(file: Path) -> tuple[Path, int, int, int]:
    """What is another when the file is."""
    try:
        status = file.stat()
    except (OSError, ValueError):  # read_lists says what is wrong with it
        return file, 0, 0, 0
    return file.absolute(), status.st_ino, status.st_size, status.st_mtime_ns


def _read(file: Path, masks: bool) -> Columns:
    source = f"annotation file {file}"
    parts: dict[str, list[Any]] = {}
    shapes = Segmentations() if masks else None
    with _no_garbage_collection():
        for kind, first, entries in read_lists(file, _LISTS):
            parts.setdefault(kind, []).append(_fields(Table(source, kind, entries, first), shapes, from_file=True))
    return _joined(source, parts, shapes)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """JSON has no cycles, and looking for some in all objects of torch takes longer than parsing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _fields(table: Table, shapes: Segmentations | None, *, from_file: bool) -> Any:
    """The columns of a block, but for segmentations, which are added to `shapes`."""
    if table.kind == "images":
        names = table.strings("file_name", empty=False) if from_file else [""] * len(table.entries)
        sizes = _sizes(table, names) if from_file or shapes is not None else np.ones((len(names), 2), dtype=np.int64)
        return table.integers("id"), sizes, names, table.strings("domain", default="")
    if table.kind == "annotations":
        if shapes is not None:
            shapes.add([entry.get("segmentation") for entry in table.entries])
        columns = [table.integers("id"), table.integers("image_id"), table.integers("category_id")]
        return [*columns, table.quadruples("bbox"), table.areas("area"), table.flags("iscrowd")]
    ids, names = table.integers("id"), table.strings("name")
    return [
        entry | {"id": id_, "name": name} for entry, id_, name in zip(table.entries, ids.tolist(), names, strict=True)
    ]


def _joined(source: str, parts: dict[str, list[Any]], shapes: Segmentations | None) -> Columns:
    image_ids, sizes, file_names, domains = zip(*parts["images"], strict=True)
    ids, of_images, of_categories, xywh, areas, crowds = zip(*parts.pop("annotations"), strict=True)
    categories = sorted(chain.from_iterable(parts["categories"]), key=lambda entry: entry["id"])
    if not categories:
        raise UserError(f"{source}: its list of categories is empty; name at least one")
    own = {"images": np.concatenate(image_ids), "annotations": np.concatenate(ids)}
    own["categories"] = np.array([entry["id"] for entry in chain.from_iterable(parts["categories"])])
    for kind, column in own.items():
        check_unique(source, kind, "id", column)
    among = np.sort(own["categories"])
    return Columns(
        source,
        categories,
        own["images"],
        np.concatenate(sizes),
        Strings(chain.from_iterable(file_names)),
        Strings(chain.from_iterable(domains)),
        own["annotations"],
        _positions(source, own["annotations"], "image_id", np.concatenate(of_images), own["images"], "images"),
        _positions(source, own["annotations"], "category_id", np.concatenate(of_categories), among, "categories"),
        np.concatenate(xywh),
        np.concatenate(areas),
        np.concatenate(crowds),
        shapes.seal() if shapes else None,
    )


def _sizes(table: Table, names: list[str]) -> np.ndarray:
    """(height, width) of each image: int64 (n, 2)."""
    sizes = np.stack([table.integers("height"), table.integers("width")], axis=1)
    bad = np.flatnonzero(((sizes < 1) | (sizes > _MAX_SIDE)).any(axis=1))
    if len(bad):
        row = int(bad[0])
        raise UserError(
            f"{table.source}: images[{table.first + row}] ({names[row]}) has width {sizes[row, 1]} and height "
            f"{sizes[row, 0]}; expected positive numbers of pixels, at most {_MAX_SIDE}"
        )
    return sizes


def _positions(
    source: str, ids: np.ndarray, key: str, values: np.ndarray, among: np.ndarray, entries: str
) -> np.ndarray:
    """Where in `among` each of `values`, of annotations with these ids, is; UserError if it is not there."""
    found = np.full(len(values), -1)
    if len(among):
        order = np.argsort(among)
        nearest = order[np.searchsorted(among, values, sorter=order).clip(max=len(among) - 1)]
        found = np.where(among[nearest] == values, nearest, -1)
    if (found < 0).any():
        row = int((found < 0).argmax())
        raise UserError(
            f"{source}: annotation {ids[row]} has {key} {values[row]}, which is not in its list of {entries}; "
            f"correct the {key} or add the entry"
        )
    return found
