"""A data set of one class for each image, checked when it is opened."""

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import UserError, quote
from ..paths import user_path
from . import archives, patches
from .arrays import LabelledImages, read_idx_pair, read_npz
from .catalog import datasets_root, split_name
from .columns import Strings
from .image import IntensityRange, read_image
from .scene import CLASSES


def resolve_classes(name: str) -> tuple[Path, ...]:
    """The paths of a data set of classes: (folder,), (file.npz,) or (images, labels).

    `name` is a known name (`patches_train`, `cifar10_train`, …) or a path, also behind "NAME=". The patches are
    generated on first use. Whether the other paths exist is not checked here.

    Raises:
        UserError: the patches cannot be written.
    """
    _, name = split_name(name)
    if name in patches.COUNTS:
        return (patches.patches_file(name),)
    if name in archives.NAMES:
        return (archives.archive_folder(name),)
    if name in archives.FOLDERS:
        return (datasets_root() / archives.FOLDERS[name],)
    images, _, labels = str(name).rpartition(":")
    whole = not images or not labels or user_path(name).exists()
    return tuple(user_path(path) for path in ((name,) if whole else (images, labels)))


def read_class_names(name: str) -> list[str]:
    """The names of the classes in the order of their labels, as `ClassificationDataset` has them; no image is read.

    Raises:
        UserError: as `ClassificationDataset`.
    """
    _, name = split_name(name)
    if name in patches.COUNTS:
        return list(CLASSES)
    paths = resolve_classes(name)
    is_folder = paths[0].is_dir() and len(paths) == 1 and name not in archives.NAMES
    return _folder_classes(paths[0]) if is_folder else _open(name, paths).class_names


class ClassificationDataset(Dataset[tuple[Any, dict[str, Any]]]):
    """Images and their classes; `dataset[i]` is `(image, target)`.

    The image is a `tv_tensors.Image`, uint8, (3, H, W), RGB; grey is repeated. The target has `labels` (int64, ()),
    `image_id` (i) and `file_name` (in a folder, below it; else the file and the position).

    Args:
        name: of a built-in set (`patches_train`, `patches_val`); of one below `$DETECTRON2_DATASETS` (`cifar10_train`,
            `cifar100_test`, `svhn_train`, `imagenet_val`, …: see `archives`); a folder with one subfolder of images for
            each class, without what is hidden; an archive `file.npz` as `read_npz` takes it; or MNIST's two files,
            `"images-idx3-ubyte:labels-idx1-ubyte"`, gzipped or not.
        transforms: of `torchvision.transforms.v2`, applied to the image.
        max_intensity: of white in images of more than 8 bits; 0: as `IntensityRange` finds it.

    Attributes:
        class_names: of each label.
        labels: of all images, int64, (N,).

    Raises:
        UserError: what is wrong with the name, a file or, from `dataset[i]`, an image.
    """

    def __init__(self, name: str, transforms: Callable[[Any], Any] | None = None, max_intensity: float = 0.0) -> None:
        self.name = name
        self.transforms = transforms
        _, name = split_name(name)
        self.path, *others = paths = resolve_classes(name)
        self.folder = not others and self.path.is_dir() and name not in archives.NAMES
        if self.folder:
            self.class_names, files, labels = _read_folder(self.path)
            self.files = Strings(os.path.relpath(file, self.path) for file in files)
            self.intensities = IntensityRange(self.path, self.files, max_intensity)
        else:
            content = _open(name, paths)
            self.class_names, self.images, labels = content.class_names, content.images, content.labels
        self.labels = torch.from_numpy(labels)
        self.positions = np.arange(len(labels))

    def keep(self, chosen: np.ndarray) -> None:
        """Leave the images out that are not `chosen`, bool (N,)."""
        self.labels, self.positions = self.labels[chosen], self.positions[chosen]

    def relabel(self, class_names: list[str], renamed: Mapping[str, str]) -> None:
        """Make labels positions in `class_names`, which has all classes by their names after `renamed`. Once."""
        lookup = torch.tensor([class_names.index(renamed.get(name, name)) for name in self.class_names])
        self.labels = lookup[self.labels]
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        position = self.positions[index]
        if self.folder:
            file_name = self.files[position]
            pixels = read_image(self.path / file_name, white=self.intensities)
        else:
            file_name = f"{self.path.name}[{position}]"
            image = self.images[position]
            # A copy: what is done to it must not change the data set.
            pixels = torch.from_numpy(np.stack([image] * 3) if image.ndim == 2 else image.transpose(2, 0, 1).copy())
        image = tv_tensors.Image(pixels)
        target = {"labels": self.labels[index].clone(), "image_id": index, "file_name": file_name}
        return (image if self.transforms is None else self.transforms(image)), target


def _open(name: str, paths: tuple[Path, ...]) -> LabelledImages:
    """What is held in memory."""
    if len(paths) == 2:
        return read_idx_pair(*paths)
    if name in archives.NAMES:
        return archives.read_archive(name)
    if name in patches.COUNTS or paths[0].suffix == ".npz":
        return read_npz(paths[0])
    known = [*patches.COUNTS, *archives.NAMES, *archives.FOLDERS]
    nearest = difflib.get_close_matches(str(name), known, n=2, cutoff=0.0)
    raise UserError(
        f"data set {name!r}: no such folder and no known name (the nearest are {', '.join(nearest)}); a classifier "
        'takes a folder with one subfolder for each class, "file.npz", or "images-idx3-ubyte:labels-idx1-ubyte"'
    )


def _folder_classes(folder: Path) -> list[str]:
    classes = sorted(entry.name for entry in _entries(folder) if entry.is_dir())
    if not classes:
        raise UserError(f"data set {folder}: has no subfolders; expected one for each class, with its images")
    if broken := [name for name in classes if not name.isprintable()]:  # nor can they be written down or drawn
        raise UserError(f"data set {folder}: the name of its subfolder {quote(broken[0])} cannot be printed: rename it")
    return classes


def _read_folder(folder: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Names of the classes; file and label (int64) of each image, sorted by class, folder and name."""
    classes = _folder_classes(folder)
    files: list[str] = []
    counts: list[int] = []
    for name in classes:
        own = sorted(_images(folder / name))
        files += [os.path.join(*file) for file in own]
        counts.append(len(own))
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        more = f" (and {len(empty) - 1} more classes)" if len(empty) > 1 else ""
        raise UserError(
            f"data set {folder}: no images in {empty[0]}{more}; expected files that end in one of "
            f"{', '.join(IMG_EXTENSIONS)}: add some or remove the subfolder"
        )
    return classes, files, np.repeat(np.arange(len(classes)), counts)


def _images(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, str]]:
    """Folder and name of each image in a folder and in those within it.

    Args:
        above: what identifies the folders it is in: a link to one of them is not followed.
    """
    status = folder.stat()
    own = (status.st_dev, status.st_ino)
    for entry in _entries(folder) if own not in above else ():
        if entry.is_dir():
            yield from _images(Path(entry.path), (*above, own))
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            if not entry.is_file():
                raise UserError(f"image {entry.path}: it is no file, or a link to none; remove it")
            yield str(folder), entry.name


def _entries(folder: Path) -> "list[os.DirEntry[str]]":
    """What is in a folder and not hidden: systems and editors leave there what ends as images do, and is none."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"data set {folder}: cannot be read ({error.strerror}); check its permissions") from error
