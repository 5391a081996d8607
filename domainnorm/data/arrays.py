"""Labelled images that fit in memory: a NumPy archive, or MNIST's own pair of files."""

import gzip
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from .files import open_file

_IDX_UNSIGNED_BYTES = 0x08  # the type in an idx file's header
_GZIP = b"\x1f\x8b"
_MAX_CLASSES = 2**20  # a label beyond is a mistake, and the names of so many classes would fill the memory


@dataclass(frozen=True)
class LabelledImages:
    """Checked: as many images as labels, at least one, and a name for each label."""

    images: np.ndarray  # uint8, (N, H, W) or (N, H, W, 3)
    labels: np.ndarray  # int64, (N,), positions in class_names
    class_names: list[str]


def held_out(labels: np.ndarray, share: float) -> np.ndarray:
    """Which images a validation set takes from a training set, bool (N,): `share` of each class, always the same."""
    chosen = np.zeros(len(labels), bool)
    rng = np.random.default_rng(0)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        chosen[own[: round(len(own) * share)]] = True
    return chosen


def read_npz(file: Path) -> LabelledImages:
    """`images` and `labels` of an archive that `np.savez` wrote; without `class_names` (strings) they are "0", "1", ….

    Objects are refused, so that no archive can run code.

    Raises:
        UserError: missing or broken file; arrays that do not fit the description above.
    """
    try:
        # A stream: NumPy leaves one that it opened itself open when the archive is broken.
        with open_file(file) as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UserError(f"{file}: is a single array; expected an archive of np.savez with images and labels")
            if missing := {"images", "labels"} - {*archive}:
                raise UserError(
                    f"{file}: has no {' and no '.join(sorted(missing))}, it has {sorted(archive)}; "
                    "save it by np.savez(file, images=…, labels=…)"
                )
            arrays = {key: archive[key] for key in ("images", "labels", "class_names") if key in archive}
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; check the path") from None
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError) as error:
        raise UserError(
            f"{file}: cannot be read ({' '.join(str(error).split()) or type(error).__name__}); "
            "expected an archive of np.savez that holds numbers and strings, no Python objects"
        ) from error
    return _checked(str(file), arrays["images"], arrays["labels"], arrays.get("class_names"))


def read_idx_pair(images: Path, labels: Path) -> LabelledImages:
    """The images and labels of two idx files, gzipped or not; the classes are called "0", "1", …

    Raises:
        UserError: missing or broken file; another type or number of dimensions; files that do not belong together.
    """
    return _checked(f"{images}:{labels}", _read_idx(images, dimensions=3), _read_idx(labels, dimensions=1), None)


def _read_idx(file: Path, dimensions: int) -> np.ndarray:
    """An array of unsigned bytes; the header: two zero bytes, type, number of dimensions, each as big-endian uint32."""
    try:
        with open_file(file) as stream:
            content = stream.read()
        if content.startswith(_GZIP):
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; check the path") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({error}); download the file again") from error
    header = 4 + 4 * dimensions
    expected = bytes([0, 0, _IDX_UNSIGNED_BYTES, dimensions])
    if content[:4] != expected or len(content) < header:
        raise UserError(
            f"{file}: begins with {content[:4].hex(' ') or 'nothing'}, expected {expected.hex(' ')}, an idx file of "
            f"unsigned bytes in {dimensions} dimensions; name images and labels in this order, joined by a colon"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    size = int(np.prod(shape, dtype=object))  # of Python's integers: nothing overflows
    if len(content) - header != size:
        raise UserError(
            f"{file}: holds {len(content) - header} bytes after its header, which says {size} "
            f"({' x '.join(map(str, shape))}); download the file again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _checked(source: str, images: np.ndarray, labels: np.ndarray, names: np.ndarray | None) -> LabelledImages:
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
        raise UserError(
            f"{source}: images are {images.dtype} of shape {images.shape}; "
            "expected uint8 of shape (N, H, W), grey, or (N, H, W, 3), RGB: convert them"
        )
    if not images.size:
        raise UserError(f"{source}: has no images, or images of no pixels (shape {images.shape}); give at least one")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise UserError(
            f"{source}: labels are {labels.dtype} of shape {labels.shape}; "
            f"expected integers of shape ({len(images)},), one for each image"
        )
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1 or len({*names.tolist()}) < len(names)):
        raise UserError(
            f"{source}: class_names are {names.dtype} of shape {names.shape}; expected a list of different strings"
        )
    lowest, highest = int(labels.min()), int(labels.max())
    count = min(highest + 1, _MAX_CLASSES) if names is None else len(names)
    if lowest < 0 or highest >= count:
        expected = f"at most {_MAX_CLASSES - 1}" if names is None else f"{count - 1}, positions in class_names"
        raise UserError(f"{source}: labels are from {lowest} to {highest}; expected from 0 to {expected}: correct them")
    class_names = [str(k) for k in range(count)] if names is None else names.tolist()
    return LabelledImages(images, labels.astype(np.int64), class_names)
