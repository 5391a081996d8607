"""The data sets of the papers on classification, as their authors distribute them, by name."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .arrays import LabelledImages, held_out
from .catalog import datasets_root
from .files import open_file

FOLDERS = {  # of images, with one subfolder for each class
    "imagenet_train": "imagenet/train",
    "imagenet_val": "imagenet/val",
}
SPLITS = ("train", "val", "trainval", "test")
CIFAR = {f"cifar{classes}_{split}": (classes, split) for classes in (10, 100) for split in SPLITS}
SVHN = {
    "svhn_train": ["train_32x32.mat"],
    "svhn_extra": ["extra_32x32.mat"],
    "svhn_trainval": ["train_32x32.mat", "extra_32x32.mat"],
    "svhn_test": ["test_32x32.mat"],
}
NAMES = (*CIFAR, *SVHN)
VALIDATION = 0.1  # share of CIFAR's training set that is held out


def archive_folder(name: str) -> Path:
    """Where the files of `name` are expected: `cifar10`, `cifar100` or `svhn` below `$DETECTRON2_DATASETS`."""
    return datasets_root() / name.rpartition("_")[0]


def read_archive(name: str) -> LabelledImages:
    """CIFAR-10, CIFAR-100 (python or binary version, unpacked) or SVHN's cropped digits.

    CIFAR's 50 000 training images are `trainval`; 5000 of them, as many of each class, are `val`, the others `train`.
    The split is the same everywhere. `svhn_trainval` is `train` and `extra`.

    Raises:
        UserError: a file is missing, broken, or cannot be read without SciPy.
    """
    folder = archive_folder(name)
    if name in SVHN:
        parts = [_read_svhn(folder / file) for file in SVHN[name]]
        images, labels = (np.concatenate(arrays) for arrays in zip(*((p.images, p.labels) for p in parts), strict=True))
        return LabelledImages(images, labels, parts[0].class_names)
    classes, split = CIFAR[name]
    images, labels, names = _read_cifar(folder, classes, "test" if split == "test" else "train")
    if split in ("train", "val"):
        validation = held_out(labels, VALIDATION)
        chosen = validation if split == "val" else ~validation
        images, labels = images[chosen], labels[chosen]
    return LabelledImages(images, labels, names)


def _read_cifar(folder: Path, classes: int, part: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images `(N, 32, 32, 3)`, labels and names of the classes."""
    python = folder / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    binary = folder / (f"cifar-{classes}-batches-bin" if classes == 10 else "cifar-100-binary")
    if not python.is_dir() and not binary.is_dir():
        raise UserError(
            f"{folder}: has neither {python.name} nor {binary.name}; unpack cifar-{classes}-python.tar.gz or "
            f"cifar-{classes}-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html there, or set "
            "DETECTRON2_DATASETS"
        )
    batches = [f"data_batch_{k}" for k in range(1, 6)] if part == "train" else ["test_batch"]
    files = batches if classes == 10 else [part]
    pixels, labels = [], []
    for file in files:
        own, of_own = (
            _python_batch(python / file, classes) if python.is_dir() else _binary_batch(binary / f"{file}.bin", classes)
        )
        pixels.append(own.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        if not len(of_own) or of_own.min() < 0 or of_own.max() >= classes:
            found = f"labels from {of_own.min()} to {of_own.max()}" if len(of_own) else "no images"
            raise UserError(f"{folder}: has {found} in {file}, expected labels from 0 to {classes - 1}")
        labels.append(of_own.astype(np.int64))
    return np.concatenate(pixels), np.concatenate(labels), _cifar_names(python, binary, classes)


def _python_batch(file: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    content = _unpickled(file)
    key = b"labels" if classes == 10 else b"fine_labels"
    pixels = content.get(b"data")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise UserError(f"{file}: expected uint8 data of 3072 bytes an image; download the archive again")
    labels = content.get(key)
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(label) is int for label in labels):
        got = f"{len(labels)} of them" if isinstance(labels, list) else type(labels).__name__
        raise UserError(
            f"{file}: expected a list of {len(pixels)} whole numbers as {key.decode()}, got {got}; "
            "download the archive again"
        )
    return pixels, np.array([min(max(label, -1), 255) for label in labels])


def _binary_batch(file: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Each image is its label (of CIFAR-100, the coarse one before it) and 3072 bytes."""
    skipped = 1 if classes == 10 else 2
    content = np.frombuffer(_read(file), np.uint8)
    if not len(content) or len(content) % (skipped + 3072):
        raise UserError(f"{file}: has {len(content)} bytes, expected {skipped + 3072} an image; download it again")
    rows = content.reshape(-1, skipped + 3072)
    return rows[:, skipped:], rows[:, skipped - 1]


def _cifar_names(python: Path, binary: Path, classes: int) -> list[str]:
    if python.is_dir():
        file = python / ("batches.meta" if classes == 10 else "meta")
        found = _unpickled(file).get(b"label_names" if classes == 10 else b"fine_label_names")
    else:
        file = binary / ("batches.meta.txt" if classes == 10 else "fine_label_names.txt")
        found = _read(file).split()
    names = (
        [name.decode(errors="replace") for name in found if isinstance(name, bytes)] if isinstance(found, list) else []
    )
    if len(set(names)) != classes:
        raise UserError(f"{file}: names {len(set(names))} classes, expected {classes}; download the archive again")
    return names


def _read_svhn(file: Path) -> LabelledImages:
    """Images `(32, 32, 3, N)` and labels from 1 to 10, where 10 is the digit 0, of a MATLAB file."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{file}: SciPy, which reads MATLAB's files, is not installed: pip install scipy") from None
    try:
        content = loadmat(io.BytesIO(_read(file)))
        images, labels = content["X"].transpose(3, 0, 1, 2), content["y"].reshape(-1).astype(np.int64)
    except UserError:
        raise
    except Exception as error:  # whatever SciPy makes of a broken file
        raise UserError(
            f"{file}: is not as http://ufldl.stanford.edu/housenumbers has it, with X and y "
            f"({type(error).__name__}: {' '.join(str(error).split())}); download it again"
        ) from error
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or labels.shape != images.shape[:1]:
        raise UserError(f"{file}: expected 32 x 32 RGB images with a label each, got {images.shape} and {labels.shape}")
    if not len(labels) or labels.min() < 1 or labels.max() > 10:
        raise UserError(f"{file}: expected labels from 1 to 10; download it again")
    return LabelledImages(np.ascontiguousarray(images), labels % 10, [str(k) for k in range(10)])


def _read(file: Path) -> bytes:
    try:
        with open_file(file) as stream:
            return stream.read()
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; unpack the whole archive there") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


class _Unpickler(pickle.Unpickler):
    """Takes NumPy's arrays only, so that no archive can run code."""

    ALLOWED = frozenset({("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype")})

    def find_class(self, module: str, name: str) -> Any:
        rebuilds = name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray")
        if rebuilds or (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickled(file: Path) -> dict[bytes, Any]:
    try:
        content = _Unpickler(io.BytesIO(_read(file)), encoding="bytes").load()
    except UserError:
        raise
    except Exception as error:  # whatever a broken file makes of the unpickler
        raise UserError(
            f"{file}: is not a batch of CIFAR's python version ({type(error).__name__}: {error}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: is not a batch of CIFAR's python version, but a {type(content).__name__}")
    return content
