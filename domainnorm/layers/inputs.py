"""What a layer is given, as tensors with a domain each, and the segments and sets of samples that they form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..autograd import is_recomputed
from ..ops.moments import Moments
from ..ops.partition import Partition, Segments

Input = TypeVar("Input", Tensor, list[Tensor])
Domain = int | Tensor  # of all samples of a tensor, or a LongTensor (N,) of each
Domains = Domain | Sequence[Domain]  # the latter of each tensor of a list
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Segmentation(NamedTuple):
    """The segments of an input, those of each domain, and those of each group of samples (None: no groups)."""

    segments: Segments
    domains: Partition
    groups: Partition | None = None


class LayerInput:
    """Tensors `(N_i, C, *)` and the domain of each, or of each of its samples.

    Attributes:
        tensors: one or several.
        domains: an int or a LongTensor `(N_i,)` for each.
        num_domains: number of domains, K.
        external: moments `(K, C)` of samples elsewhere that belong to the same normalization batches, or None.
        updates: whether a layer in training updates its population statistics: not when activation checkpointing runs
            the forward pass again.
    """

    def __init__(self, tensors: list[Tensor], domains: Sequence[Domain], num_domains: int) -> None:
        self.tensors = tensors
        self.domains = domains
        self.num_domains = num_domains
        self.external: Moments | None = None
        self.updates = not is_recomputed()

    @staticmethod
    def of(x: Tensor | Sequence[Tensor], domain: Domains | None, num_domains: int, num_features: int) -> LayerInput:
        """A tensor and its `domain`, a list with one tensor per domain, or a list of tensors with a domain each.

        Raises:
            ValueError: the domain is not given, or wrong; or the shapes are not `(N, num_features, *)`.
            TypeError: not dense tensors of floating point numbers.
        """
        domains: Sequence[Domain]
        if not isinstance(x, (Tensor, list, tuple)):
            raise TypeError(f"expected a tensor (N, {num_features}, …) or a list of them, got {type(x).__name__}")
        if isinstance(x, Tensor):
            if domain is None:
                if num_domains > 1:
                    raise ValueError(
                        f"a layer with num_domains={num_domains} got a single tensor and no domain: give a list of "
                        f"{num_domains} tensors, or say domain=k, or domain=ids with one domain per sample"
                    )
                domain = 0
            elif not isinstance(domain, (int, Tensor)):
                raise ValueError(f"a single tensor has one domain, or LongTensor of each sample's: got {domain!r}")
            tensors, domains = [x], [domain]
        elif domain is None:
            if len(x) != num_domains:
                raise ValueError(f"expected a list of num_domains={num_domains} tensors, got {len(x)}")
            tensors, domains = list(x), range(num_domains)
        else:
            if isinstance(domain, (int, Tensor)) or len(domain) != len(x) or not len(x):
                raise ValueError(
                    f"a list of {len(x)} tensors has one tensor per domain, or a list of {len(x)} domains (each an int "
                    "or a LongTensor of the samples'): leave domain= out, or give such a list"
                )
            tensors, domains = list(x), list(domain)
        for tensor, own in zip(tensors, domains, strict=True):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"expected a list of tensors (N, {num_features}, …), got {type(tensor).__name__} in it")
            if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
                names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                raise TypeError(f"expected a dense tensor of {names}, got {tensor.dtype}, {tensor.layout}")
            _check_domain(own, tensor, num_domains)
            if tensor.ndim < 2 or tensor.shape[1] != num_features:
                raise ValueError(f"expected inputs (N, {num_features}, …), got {tuple(tensor.shape)}")
        return LayerInput(tensors, domains if num_domains > 1 else [0] * len(tensors), num_domains)

    @property
    def has_ids(self) -> bool:
        """Whether samples of one tensor may be of several domains."""
        return any(isinstance(domain, Tensor) for domain in self.domains)

    def ids(self) -> Tensor:
        """The domain of each sample of all tensors, one tensor after the other."""
        device = self.tensors[0].device
        ids = [
            d.to(device) if isinstance(d, Tensor) else torch.full(x.shape[:1], d, dtype=torch.long, device=device)
            for x, d in zip(self.tensors, self.domains, strict=True)
        ]
        return torch.cat(ids) if len(ids) > 1 else ids[0]

    def segmentation(self, by_sample: bool = False) -> Segmentation:
        """Each tensor is one segment or, with `by_sample` or where domains differ within a tensor, each sample is."""
        if self.has_ids:
            return Segmentation([None] * len(self.tensors), Partition(self.num_domains, ids=self.ids()))
        runs = [(int(d), x.shape[0] if by_sample else 1) for x, d in zip(self.tensors, self.domains, strict=True)]
        segments: Segments = [None if by_sample else [x.shape[0]] for x in self.tensors]
        return Segmentation(segments, Partition(self.num_domains, runs))

    def elements_of_domains(self, elements: Sequence[int], shared: bool) -> list[int] | None:
        """Elements of each domain, or with `shared` of all; None where they are known on the device only.

        Args:
            elements: that a sample of each tensor has in a channel.
        """
        if self.has_ids and not shared:
            return None
        totals = [0] * (1 if shared else self.num_domains)
        for x, domain, number in zip(self.tensors, self.domains, elements, strict=True):
            totals[0 if shared or isinstance(domain, Tensor) else domain] += x.shape[0] * number
        return totals


def spatial_elements(tensors: Sequence[Tensor]) -> list[int]:
    """Elements of a channel of one sample of each tensor."""
    return [math.prod(x.shape[2:]) for x in tensors]


def check_equal_sizes(inputs: Sequence[LayerInput]) -> None:
    """ValueError unless the inputs have equal sizes: one collective carries one count per domain for all layers."""
    shapes = [[(x.shape[0], *x.shape[2:]) for x in own.tensors] for own in inputs]
    for other in shapes[1:]:
        if other != shapes[0]:
            raise ValueError(
                f"synchronized layers at equal depth take inputs of equal N and spatial sizes, got {shapes[0]} and "
                f"{other}"
            )


def _check_domain(domain: Domain, x: Tensor, num_domains: int) -> None:
    if not isinstance(domain, Tensor):
        if isinstance(domain, bool) or not isinstance(domain, (int, torch.SymInt)):
            raise ValueError(f"domain= takes an int or a LongTensor for each tensor, got {domain!r}")
        if not 0 <= domain < num_domains:
            raise ValueError(f"domains are 0 to {num_domains - 1}, got {domain}")
        return
    if domain.shape != x.shape[:1] or domain.dtype != torch.long:
        raise ValueError(
            f"domain= takes an int or a LongTensor of shape ({x.shape[0]},), "
            f"got {domain.dtype} of shape {tuple(domain.shape)}"
        )
    # On a GPU, and in a compiled graph, indexing checks it: without waiting, and without breaking the graph.
    if domain.device.type == "cpu" and domain.numel() and not torch.compiler.is_compiling():
        low, high = int(domain.min()), int(domain.max())
        if low < 0 or high >= num_domains:
            raise ValueError(f"domains are 0 to {num_domains - 1}, got {low} to {high}")
