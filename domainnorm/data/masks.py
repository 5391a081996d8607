"""The segmentations of COCO files (polygons, uncompressed and compressed RLE): checked, kept as arrays, decoded."""

from array import array
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .table import brief

MISSING = "is missing"
_NONE, _POLYGONS, _RLE = 0, 1, 2
_FAR = 10  # times the longer side of the image; there, pycocotools would take all memory
_MAX_PIXELS = 2**32 - 1  # what a run of pycocotools can be


class Segmentations:
    """The segmentations of n objects, in arrays, which processes share; blocks of them are added until it is sealed.

    Args:
        values: what the file has of each object, None where it has nothing.

    Attributes:
        kinds: whether there is none, polygons or an RLE: n numbers.
        ends: where in `polygons`, `coordinates` and `text` what belongs to each ends: 3n.
        polygons: the number of coordinates of each polygon.
        coordinates: x and y of all points of polygons.
        text: compressed RLEs.
        extents: the largest distance of a coordinate from 0, or the number of pixels of the RLE: n.
        sizes: height and width of the RLE: 2n.
        problems: of those that cannot be used, what is wrong.
    """

    def __init__(self, values: Sequence[Any] = ()) -> None:
        self.kinds, self.text = array("B"), array("B")
        self.ends, self.polygons, self.sizes = array("q"), array("q"), array("q")
        self.coordinates, self.extents = array("d"), array("d")
        self.problems: dict[int, str] = {}
        self.add(values)

    def add(self, values: Sequence[Any]) -> None:
        """What the file has of some more objects."""
        problems = {row: MISSING for row, value in enumerate(values) if not value}
        lists = [value if type(value) is list else [] for value in values]
        flat = _flatten(lists)
        if flat is None:
            for row, value in enumerate(lists):
                if value and _flatten([value]) is None:
                    problems[row] = "is not a list of polygons, each of at least three points x, y"
                    lists[row] = []
            flat = _flatten(lists)
        assert flat is not None
        polygons, coordinates = flat

        texts: list[bytes] = [b""] * len(values)
        extents = np.zeros(len(values))
        sizes = np.zeros((len(values), 2), dtype=np.int64)
        for row, value in enumerate(values):
            if value and type(value) is not list:
                try:
                    texts[row], sizes[row], extents[row] = _compressed(value)
                except ValueError as error:
                    problems[row] = str(error)
        per_object = np.array([len(value) for value in lists], dtype=np.int64)
        polygon_ends = np.cumsum(per_object)
        coordinate_ends = np.concatenate([[0], np.cumsum(polygons)])[polygon_ends]
        text_ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        ends = np.stack([polygon_ends, coordinate_ends, text_ends], axis=1)
        if len(polygons):
            farthest = np.maximum.reduceat(np.abs(coordinates), np.cumsum(polygons) - polygons)
            np.maximum.at(extents, np.repeat(np.arange(len(values)), per_object), farthest)
        kinds = np.where(per_object > 0, _POLYGONS, _NONE).astype(np.uint8)
        kinds[[row for row, text in enumerate(texts) if text]] = _RLE

        self.problems |= {len(self.kinds) + row: problem for row, problem in problems.items()}
        ends += [len(self.polygons), len(self.coordinates), len(self.text)]
        self.text.frombytes(b"".join(texts))
        for own, more in (
            (self.kinds, kinds),
            (self.ends, ends),
            (self.polygons, polygons),
            (self.coordinates, coordinates),
            (self.extents, extents),
            (self.sizes, sizes),
        ):
            own.frombytes(more.tobytes())

    def seal(self) -> "Segmentations":
        """Itself; nothing is added any more, and its arrays are numpy's."""
        for name in ("kinds", "ends", "polygons", "coordinates", "text", "extents", "sizes"):
            setattr(self, name, np.asarray(getattr(self, name)))
        return self

    def unusable(self, sizes: np.ndarray) -> dict[int, str]:
        """What is wrong with each that is no mask of an image of (height, width) `sizes` (n, 2)."""
        found = dict(self.problems)
        kinds, extents, own = np.asarray(self.kinds), np.asarray(self.extents), np.asarray(self.sizes).reshape(-1, 2)
        far = (kinds == _POLYGONS) & (extents > _FAR * sizes.max(axis=1, initial=0))
        other = (kinds == _RLE) & (own != sizes).any(axis=1)
        short = (kinds == _RLE) & (extents != sizes.prod(axis=1, dtype=np.float64))
        for row in np.flatnonzero(far | other | short).tolist():
            if row in found:
                continue
            if far[row]:
                found[row] = f"has a point at {extents[row]:g}, far outside the image"
            elif other[row]:
                has, image = own[row].tolist(), sizes[row].tolist()
                found[row] = f"is an RLE of size {has}, the image has {image} (height, width)"
            else:
                pixels = int(sizes[row].prod())
                found[row] = f"cannot be decoded (its RLE counts do not add up to {pixels} pixels)"
        return found

    def rle(self, row: int, size: tuple[int, int]) -> dict[str, Any]:
        """The mask of an object in an image of (height, width) `size`, as pycocotools takes it."""
        if self.kinds[row] == _RLE:
            return {"size": list(size), "counts": self._part(row, 2, self.text).tobytes()}
        return rle_of_polygons(self._polygons(row), size)

    def coco(self, row: int, size: tuple[int, int]) -> Any:
        """As in a COCO file; None if there is none that can be used."""
        if self.kinds[row] == _RLE:
            return {"size": list(size), "counts": self._part(row, 2, self.text).tobytes().decode()}
        return self._polygons(row) or None

    def mask(self, row: int, size: tuple[int, int]) -> np.ndarray:
        """The mask of an object: uint8, (H, W), values 0 and 1."""
        return coco_mask.decode(self.rle(row, size))

    def _polygons(self, row: int) -> list[list[float]]:
        ends = accumulate(self._part(row, 0, self.polygons), initial=0)
        coordinates = self._part(row, 1, self.coordinates).tolist()
        return [coordinates[start:end] for start, end in pairwise(ends)]

    def _part(self, row: int, column: int, values: Any) -> Any:
        return values[self.ends[3 * (row - 1) + column] if row else 0 : self.ends[3 * row + column]]


def rle_of_polygons(polygons: list[list[float]], size: tuple[int, int]) -> dict[str, Any]:
    """What is inside of any of `polygons`."""
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *size))


def _flatten(lists: Sequence[list[Any]]) -> tuple[np.ndarray, np.ndarray] | None:
    """The number of coordinates of each polygon, and all coordinates; None if one is no polygon."""
    polygons = list(chain.from_iterable(lists))
    if set(map(type, polygons)) - {list}:
        return None
    lengths = np.array([len(polygon) for polygon in polygons], dtype=np.int64)
    numbers = list(chain.from_iterable(polygons))
    # Checked here because pycocotools takes four numbers for a box and ignores the last of an odd number.
    if set(map(type, numbers)) - {int, float} or (lengths < 6).any() or (lengths % 2).any():
        return None
    try:
        coordinates = np.fromiter(numbers, dtype=np.float64, count=len(numbers))
    except OverflowError:  # an integer beyond floats
        return None
    return (lengths, coordinates) if np.isfinite(coordinates).all() else None


def _compressed(value: Any) -> tuple[bytes, list[int], int]:
    """The compressed counts of an RLE, its size, and the sum of its counts.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not dict or not {"size", "counts"} <= value.keys():
        raise ValueError("is neither a list of polygons nor an RLE with size and counts")
    size, counts = value["size"], value["counts"]
    if type(size) is not list or len(size) != 2 or not all(type(side) in (int, float) and side > 0 for side in size):
        raise ValueError(f"is an RLE of size {brief(size)}, expected [height, width]")
    if any(side != side // 1 or side > _MAX_PIXELS for side in size) or size[0] * size[1] > _MAX_PIXELS:
        raise ValueError(f"is an RLE of size {brief(size)}, expected whole numbers of at most {_MAX_PIXELS} pixels")
    size = [int(side) for side in size]
    if type(counts) is str:
        if not counts or not all("0" <= character <= "o" for character in counts):
            raise ValueError("cannot be decoded (its RLE counts are no text that encodes numbers)")
        return counts.encode(), size, _pixels(counts.encode())
    if type(counts) is not list or set(map(type, counts)) - {int} or min(counts, default=0) < 0:
        raise ValueError("has RLE counts that are neither a string nor a list of whole numbers")
    if sum(counts) != size[0] * size[1]:
        raise ValueError(f"has RLE counts that do not add up to its {size[0] * size[1]} pixels")
    return coco_mask.frPyObjects({"size": size, "counts": counts}, *size)["counts"], size, sum(counts)


def _pixels(counts: bytes) -> int:
    """The sum of compressed run lengths; -1 if one is negative or is no run that pycocotools has.

    5 bits of a number are in a character, the lowest first; from the fourth number on, they are relative to the last
    but one. Where there are too few, pycocotools would leave the rest of the mask uninitialized, and compare masks for
    ever.

    Raises:
        ValueError: they end within a number.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of a number; its highest bit is the sign
            value -= (bits & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("cannot be decoded (its RLE counts end within a number)")
    return sum(runs) if min(runs) >= 0 and sum(runs) <= _MAX_PIXELS else -1
