"""Data sets of others: what `dn.train` and `dn.evaluate` are given as `train_data`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

from ..errors import UserError
from .table import brief


def own_sets(train_data: Any, transforms: Callable[..., Any] | None = None) -> list[Any]:
    """Data sets of others, checked on their first image.

    Args:
        train_data: one or a list of them: `len(dataset)` images, and `dataset[i]` an `(image, target)` as
            `train_loader` gives them. Some may be of this library.
        transforms: of image and target.

    Raises:
        UserError: one is none, is empty, or has other images.
    """
    datasets = list(train_data) if isinstance(train_data, (list, tuple)) else [train_data]
    found = [_Transformed(dataset, transforms) if transforms is not None else dataset for dataset in datasets]
    for dataset, own in zip(found, datasets, strict=True):
        name = type(own).__name__
        if not hasattr(own, "__getitem__") or not hasattr(own, "__len__"):
            raise UserError(
                f"train_data takes data sets, with __len__ and __getitem__, got {name}: the sampler must know how many "
                "images there are, to share them over processes and to go on where a run was stopped"
            )
        if not len(own):
            raise UserError(f"train_data: {name} has no image to train on; give one that has")
        with torch.random.fork_rng(devices=[]):
            sample = dataset[0]
        if type(sample) is not tuple or len(sample) != 2 or not isinstance(sample[1], Mapping):
            raise UserError(f"train_data: {name}[0] is {brief(sample)}; expected (image, target), target a dict")
        image = sample[0]
        if not isinstance(image, torch.Tensor) or image.ndim != 3 or not image.is_floating_point():
            what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
            raise UserError(
                f"train_data: the image of {name}[0] is {what}; expected floats (3, H, W) in [0, 1], as "
                "torchvision.transforms.v2.ToDtype(torch.float32, scale=True) makes them: give it as transforms"
            )
    return found


class _Transformed(Dataset[Any]):
    """A data set of others and its transforms."""

    def __init__(self, dataset: Any, transforms: Callable[..., Any]) -> None:
        self.dataset = dataset
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # before __init__, as pickle makes it
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> Any:
        return self.transforms(*self.dataset[index])
