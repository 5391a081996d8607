"""What a layer is given, as tensors with a domain each: the one form behind the three ways to say it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..moments import Moments, Rows, is_recomputed

Input = TypeVar("Input", Tensor, list[Tensor])
Domain = int | Tensor  # of all samples of a tensor, or a LongTensor (N,) of each
Domains = Domain | Sequence[Domain]  # the latter of each tensor of a list


class DomainBatch:
    """Tensors `(N, C, *)` and the domain of each.

    Attributes:
        elements: how many numbers a row of each tensor brings into a normalization batch.
        extra: moments `(K, C)` of samples elsewhere that belong to the same normalization batches; None: of none.
        updates: whether a layer in training updates its running statistics with this batch.
    """

    def __init__(
        self,
        tensors: list[Tensor],
        domains: Sequence[Domain],
        num_domains: int,
        read: Callable[[list[Tensor]], tuple[Rows, Moments]] | None = None,
        elements: Callable[[Tensor], int] | None = None,
    ) -> None:
        """
        Args:
            read: of tensors, their rows and the moments of these that the statistics count; None: just the rows'.
            elements: of a tensor, how many numbers its row brings; None: as many as it has.
        """
        self.tensors = tensors
        self.domains = domains
        self.num_domains = num_domains
        self.elements = [math.prod(x.shape[2:]) if elements is None else elements(x) for x in tensors]
        self.extra: Moments | None = None
        self.updates = not is_recomputed()
        self._read = _as_they_are if read is None else read  # `or` is a branch to torch 2.11's compiler
        self._rows: tuple[Rows, Moments] | None = None

    @staticmethod
    def of(
        x: Tensor | Sequence[Tensor],
        domain: Domains | None,
        num_domains: int,
        num_features: int,
        read: Callable[[list[Tensor]], tuple[Rows, Moments]] | None = None,
        elements: Callable[[Tensor], int] | None = None,
    ) -> DomainBatch:
        """The input of a layer: a tensor and its `domain`, a list with one tensor per domain, or a list with domains.

        Raises:
            ValueError: the domain is not said, or wrong; or the shapes are not `(N, num_features, *)`.
        """
        domains: Sequence[Domain]
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
        for tensor, of in zip(tensors, domains, strict=True):
            _check_domain(of, tensor, num_domains)
            if tensor.ndim < 2 or tensor.shape[1] != num_features:
                raise ValueError(f"expected inputs (N, {num_features}, …), got {tuple(tensor.shape)}")
        return DomainBatch(tensors, domains, num_domains, read, elements)

    @property
    def rows(self) -> Rows:
        """Of all tensors; they are read once, at the first use."""
        return self._once()[0]

    @property
    def counted(self) -> Moments:
        """What the statistics count of the rows: moments `(ΣN, …)`, of each sample."""
        return self._once()[1]

    def _once(self) -> tuple[Rows, Moments]:
        if self._rows is None:
            self._rows = self._read(self.tensors)
        return self._rows

    def ids(self) -> Tensor:
        """The domain of each sample of all tensors, one after the other."""
        device = self.tensors[0].device
        ids = [
            d.to(device) if isinstance(d, Tensor) else torch.full(x.shape[:1], d, dtype=torch.long, device=device)
            for x, d in zip(self.tensors, self.domains, strict=True)
        ]
        return torch.cat(ids) if len(ids) > 1 else ids[0]

    @property
    def each(self) -> int:
        """The samples of each tensor, where there is one tensor for each domain, in order, of as many; else 0."""
        number = self.tensors[0].shape[0]
        alike = all(isinstance(domain, int) for domain in self.domains) and all(
            x.shape[0] == number for x in self.tensors
        )
        return number if alike and list(self.domains) == list(range(self.num_domains)) else 0

    def of_rows(self, value: Any) -> Any:
        """Of something `(K, …)`, of domains, what belongs to each row: `(ΣN, …)`."""
        each = self.each
        return value.repeat_interleave(each, 0) if each else value[self.ids()]

    def by_domain(self) -> Moments:
        """All rows merged per domain, `(K, C)`, on this rank, with the `extra` ones."""
        if self.num_domains == 1:
            own = self.counted.merge(0)
        elif self.each:
            own = self.counted.merge_neighbours(self.each)
        else:
            own = self.counted.merge_by(self.ids(), self.num_domains)
        return own if self.extra is None else own + self.extra

    def together(self) -> Moments:
        """All rows of all domains merged, `(1, C)`, on this rank, with the `extra` ones."""
        own = self.counted.merge(0)
        return own if self.extra is None else own + self.extra.merge(0)

    def cannot_be_single(self, per_domain: bool, ranks: int) -> bool:
        """Whether the shapes of this rank alone rule out a normalization batch of one element, over all ranks."""
        sizes = [len(x) * elements for x, elements in zip(self.tensors, self.elements, strict=True)]
        if any(isinstance(d, Tensor) for d in self.domains):  # the counts are on the device, but come in whole rows
            return ranks == 1 and min(self.elements) > 1
        if not per_domain:
            sizes = [sum(sizes)]
        else:
            totals = [0] * self.num_domains
            for domain, size in zip(self.domains, sizes, strict=True):
                totals[int(domain)] += size
            sizes = totals
        return min(sizes) > 1 if ranks > 1 else 1 not in sizes


def _as_they_are(tensors: list[Tensor]) -> tuple[Rows, Moments]:
    rows = Rows(tensors)
    return rows, rows.moments


def _check_domain(domain: Domain, x: Tensor, num_domains: int) -> None:
    if not isinstance(domain, Tensor):
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


def of_domain(value: Any, domain: int | Tensor) -> Any:
    """The row(s) of a `(K, C)` tensor that belong to `domain`; a shared `(C,)` belongs to all."""
    return value if value is None or value.ndim == 1 else value[domain]
