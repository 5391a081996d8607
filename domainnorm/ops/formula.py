"""The one formula: moments of segments are merged to those of normalization batches, which give an affine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed.collectives import Group
from .moments import Moments
from .partition import Partition, Segments
from .population import Population


class Affine(NamedTuple):
    """`scale · (x - center) + shift` of each segment, `(S, C)` each, or `(1, C)` of all; and what it was made of.

    Attributes:
        scale, center, shift: the affine.
        batch: the moments of each segment's normalization batch; None: they do not give the affine alone.
        factor: r / sqrt(var + eps), with the r of Batch Renorm: the scale without the weight.
        d: of Batch Renorm; None: 0.
    """

    scale: Tensor
    center: Tensor
    shift: Tensor
    batch: Moments | None
    factor: Tensor
    d: Tensor | None


@dataclass
class Normalization:
    """What one layer does to its input: which segments are normalized together, and what else comes into it.

    Attributes:
        tensors: the input, each `(N_i, C, *)`.
        segments: the numbers of samples of each tensor's segments (see `eager`).
        domain_of: the domain of each tensor, or of each of its samples.
        domains: which segments are of each domain.
        weight, bias: `(C,)` of all domains, `(K, C)`, or None.
        eps: added to variances.
        shared: whether all domains are normalized by the same moments.
        groups: groups of samples that are normalized apart; None: a domain is, or with `shared` all are, one group.
        channels_per_group: neighboring channels that are normalized together.
        merged_channels: whether the moments of the domains, too, are those of such channels.
        channels_per_first_group: of a GroupNorm that comes first (SeqNorm), where segments are samples; 0: none does.
        channels_per_last_group: likewise, of one that comes last.
        external: moments `(K, C)` of samples elsewhere that belong to the domains; None: there are none.
        sync: the process group, in a tuple, over whose ranks moments are merged; None: this rank alone.
        correction: gives r and d of Batch Renorm from this and `(mean, var)` of each segment's batch; None: 1 and 0.
        population: the statistics to be updated by the moments; None: there is no update.
        counts: elements of each set of moments that the population gets, where they are known on the host.
        check_counts: called with the elements of each domain, over all ranks, before they normalize; None: nothing is.
        by_population: mean and variance, `(C,)` or `(K, C)`, that normalize instead of the input's moments.
        example_weight: how much each sample's own moments weigh against `by_population`.
    """

    tensors: Sequence[Tensor]
    segments: Segments
    domain_of: Sequence[int | Tensor]
    domains: Partition
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    shared: bool = True
    groups: Partition | None = None
    channels_per_group: int = 1
    merged_channels: bool = False
    channels_per_first_group: int = 0
    channels_per_last_group: int = 0
    external: Moments | None = None
    sync: tuple[Group] | None = None
    correction: Callable[[Normalization, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    population: Population | None = None
    counts: Sequence[float] | None = None
    check_counts: Callable[[Sequence[float]], None] | None = None
    by_population: tuple[Tensor, Tensor] | None = None
    example_weight: float = 0.0

    def is_batch_norm(self) -> bool:
        """Whether it is the plain BatchNorm of each domain or, where they are shared, of all."""
        return (
            self.groups is None
            and self.channels_per_group == 1
            and not self.has_group_norm()
            and self.external is None
            and self.sync is None
            and self.correction is None
            and self.by_population is None
            and all(isinstance(domain, int) for domain in self.domain_of)
        )

    def is_constant(self) -> bool:
        """Whether it is an affine that does not depend on the input."""
        return self.by_population is not None and not self.example_weight and not self.has_group_norm()

    def has_group_norm(self) -> bool:
        """Whether there is a GroupNorm before or after, which looks at each sample."""
        return bool(self.channels_per_first_group or self.channels_per_last_group)

    def is_batch_norm_of_each_tensor(self) -> bool:
        """Whether a BatchNorm that is called for one tensor after the other does the same."""
        domains = list(self.domain_of)
        if not self.is_batch_norm() or len(set(domains)) < len(domains) or (self.shared and len(domains) > 1):
            return False
        return self.population is None or self.population.mean.ndim == 2 or domains == sorted(domains)

    def with_values(self, weight: Tensor | None, bias: Tensor | None, tensors: Sequence[Tensor]) -> Normalization:
        """The same, with these parameters and tensors."""
        new = object.__new__(Normalization)  # `copy.copy` takes five times as long
        vars(new).update(vars(self), weight=weight, bias=bias, tensors=tensors)
        return new

    def by_samples(self) -> Normalization:
        """The same, with a segment for each sample."""
        if all(sizes is None for sizes in self.segments):
            return self
        sizes = [size for x, own in zip(self.tensors, self.segments, strict=True) for size in own or [1] * x.shape[0]]
        groups = None if self.groups is None else self.groups.refined(sizes)
        segments = [None] * len(self.tensors)
        return dataclasses.replace(self, segments=segments, domains=self.domains.refined(sizes), groups=groups)

    def of_segments(self, values: Tensor) -> Tensor:
        """Values `(C,)` of all domains as `(1, C)`; values `(K, C)` as those of segments."""
        return values[None] if values.ndim == 1 else self.domains.spread(values)

    def before_merge(self, segments: Moments) -> tuple[Moments, tuple[Tensor, Tensor] | None]:
        """What is merged of the segments' moments; and the center and the factor of a GroupNorm that comes first."""
        if self.channels_per_first_group:
            groups = segments.mean.shape[1] // self.channels_per_first_group
            first = segments.merge_channels(groups).repeat_channels(self.channels_per_first_group)
            factor = (first.var + self.eps).rsqrt()
            after = Moments(segments.count, (segments.mean - first.mean) * factor, segments.var * factor.square())
            return after, (first.mean, factor)
        if self.merged_channels:
            return segments.merge_channels(segments.mean.shape[1] // self.channels_per_group), None
        return segments, None

    def merge_domains(self, segments: Moments) -> Moments:
        """The moments of the domains `(K, C)`, or of all `(1, C)` where no more is asked for, on this rank.

        What micro-batches of Batch Renorm divide by goes to `population`, which averages it.
        """
        as_one = self.shared and (self.population is None or self.population.mean.ndim == 1)
        merged = segments.merge(0) if as_one else self.domains.merge(segments)
        if self.groups is not None and self.population is not None and self.population.averages_deviation:
            self.population.deviation = self._mean_deviation(segments, as_one).detach()
        if self.external is None:
            return merged
        return merged + (self.external.merge(0) if as_one else self.external)

    def _mean_deviation(self, segments: Moments, as_one: bool) -> Tensor:
        """The mean of sqrt(variance + eps) over the groups of each domain, by their elements (Batch Renorm, 4.2).

        It is what a group divides by in expectation. That of all samples together also has the variance between groups.
        """
        assert self.groups is not None
        deviation = self.groups.spread((self.groups.merge(segments).var + self.eps).sqrt())
        count = segments._tensors()[0]
        sums = torch.cat([count * deviation, count], 1)
        sums = sums.sum(0, keepdim=True) if as_one else self.domains.sum(sums)
        return sums[:, :-1] / sums[:, -1:].clamp(min=1)

    def batches(self) -> Partition | None:
        """Which segments are normalized together; None: all are."""
        return self.groups if self.groups is not None else None if self.shared else self.domains

    def batch_of_segments(self, segments: Moments, domains: Moments | None) -> Moments:
        """The moments that each segment is normalized by, `(S, C)` or `(1, C)`."""
        partition = self.batches()
        if domains is None:
            batch, partition = self._weighed(segments), None
        elif self.groups is not None:
            batch = self.groups.merge(segments)
        else:
            batch = domains.merge(0) if partition is None else domains
        if self.channels_per_group > 1:
            if not self.merged_channels:
                batch = batch.merge_channels(batch.mean.shape[1] // self.channels_per_group)
            batch = batch.repeat_channels(self.channels_per_group)
        return (
            batch
            if partition is None
            else Moments(*(partition.spread(v) for v in (batch.count, batch.mean, batch.var)))
        )

    def _weighed(self, segments: Moments) -> Moments:
        """The union of each sample's own moments and the population's, by their weights (*Four Things*, Eq. 3)."""
        assert self.by_population is not None
        mean, var = (self.of_segments(v).to(segments.mean.dtype) for v in self.by_population)
        own = self.example_weight
        delta = segments.mean - mean
        between = own * (1 - own) * delta.square()
        return Moments(segments.count, mean + own * delta, own * segments.var + (1 - own) * var + between)


def coefficients(
    problems: Sequence[Normalization],
    segments: Sequence[tuple[Tensor, Tensor]],
    affine: Sequence[tuple[Tensor | None, Tensor | None]],
) -> tuple[list[Affine], list[Moments | None]]:
    """The affine of every segment, and the moments of the domains.

    Args:
        segments: the mean and the variance of each segment, `(S, C)`.
        affine: weight and bias of each layer.
    """
    own, first, domains = [], [], []
    for problem, (mean, var) in zip(problems, segments, strict=True):
        moments, group_norm = problem.before_merge(Moments(counts(problem, mean), mean, var))
        own.append(moments)
        first.append(group_norm)
        domains.append(problem.merge_domains(moments) if problem.by_population is None else None)
    if problems[0].sync is not None:
        domains = _merge_ranks(domains, problems[0].sync[0])
    for problem, merged in zip(problems, domains, strict=True):
        if problem.check_counts is not None and merged is not None:
            problem.check_counts(merged.count.flatten().tolist())
    affines = [_affine(*values) for values in zip(problems, own, first, domains, affine, strict=True)]
    return affines, domains


def _affine(
    problem: Normalization,
    segments: Moments,
    group_norm: tuple[Tensor, Tensor] | None,
    domains: Moments | None,
    affine: tuple[Tensor | None, Tensor | None],
) -> Affine:
    """`weight · ((x - mean) · factor + d) + bias`, by the moments of each segment's batch."""
    batch = problem.batch_of_segments(segments, domains)
    weight, bias = (None if v is None else problem.of_segments(v) for v in affine)
    factor, center, d = (batch.var + problem.eps).rsqrt(), batch.mean, None
    shift = center.new_zeros(1, center.shape[1]) if bias is None else bias
    if problem.correction is not None:
        r, d = problem.correction(problem, batch.mean, batch.var)
        factor, shift = factor * r, shift + (d if weight is None else d * weight)
    scale = factor if weight is None else factor * weight
    if problem.channels_per_last_group:  # of z = (x - center) · factor
        z = Moments(segments.count, (segments.mean - center) * factor, segments.var * factor.square())
        last = z.merge_channels(z.mean.shape[1] // problem.channels_per_last_group)
        last = last.repeat_channels(problem.channels_per_last_group)
        last_factor = (last.var + problem.eps).rsqrt()
        moved = last.mean * last_factor
        scale, shift = scale * last_factor, shift - (moved if weight is None else moved * weight)
    if group_norm is not None:  # of z = (x - first_center) · first_factor
        first_center, first_factor = group_norm
        shift, center, scale = shift - center * scale, first_center, scale * first_factor
    alone = not problem.has_group_norm() and domains is not None
    if scale.dtype != segments.mean.dtype or shift.dtype != segments.mean.dtype:  # of weight and bias in another type
        scale, shift = scale.to(segments.mean.dtype), shift.to(segments.mean.dtype)
    return Affine(scale, center, shift, batch if alone else None, factor, d)


def _merge_ranks(domains: Sequence[Moments | None], group: Group) -> list[Moments | None]:
    """The moments of all layers over all ranks, by one collective."""
    known = [moments for moments in domains if moments is not None]
    if any(moments.mean.shape[0] != known[0].mean.shape[0] for moments in known):
        raise ValueError("layers that share a collective have equal domains")
    joined = Moments(known[0].count, *(torch.cat([getattr(m, v) for m in known], 1) for v in ("mean", "var")))
    merged = joined.merge_ranks(group)
    widths = [moments.mean.shape[1] for moments in known]
    parts = zip(merged.mean.split(widths, 1), merged.var.split(widths, 1), strict=True)
    return [Moments(merged.count, mean, var) for mean, var in parts]


def counts(problem: Normalization, like: Tensor) -> Tensor:
    """Elements of each segment and channel, `(S, 1)`; `(1, 1)` where all have as many."""
    runs = [  # (segments, elements of each)
        (x.shape[0] if sizes is None else 1, size * math.prod(x.shape[2:]))
        for x, sizes in zip(problem.tensors, problem.segments, strict=True)
        for size in ([1] if sizes is None else sizes)
    ]
    if len(runs) == 1:
        number, count = runs[0]
        return like.new_full((1, 1) if number else (0, 1), count)
    if like.is_cpu and not torch.compiler.is_compiling():
        return like.new_tensor([float(count) for number, count in runs for _ in range(number)])[:, None]
    return torch.cat([like.new_full((number, 1), count) for number, count in runs])  # a GPU is not waited for
