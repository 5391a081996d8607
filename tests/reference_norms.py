"""Slow and obvious versions of the layers that group samples and channels, in plain autograd.

Every element of `x` carries a label, its normalization batch; a loop over the labels takes mean and variance of the
elements with that label. A layer is then its labels.
"""

import itertools
import math

import torch
from torch import Tensor

# ---- labels: one integer for each element of x ---------------------------------------------------------------------


def sample_of(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0]).view(-1, *[1] * (x.ndim - 1)).expand(x.shape)


def channel_of(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1]).view(1, -1, *[1] * (x.ndim - 2)).expand(x.shape)


def channel_group_of(x: Tensor, groups: int) -> Tensor:
    return channel_of(x) // (x.shape[1] // groups)


def piece_of(x: Tensor, pieces: int) -> Tensor:
    """Which of `pieces` equal, consecutive pieces of its flattened sample each number is in."""
    features = x.shape[1:].numel()
    return (torch.arange(features) // (features // pieces)).view(x.shape[1:]).expand(x.shape)


def group_sizes(samples: int, size: int) -> list[int]:
    """Samples split in order; the last group is the smaller one."""
    return [min(size, samples - start) for start in range(0, samples, size)]


def ghost_sizes(samples: int, size: int, elements: int) -> list[int]:
    """As `group_sizes`, but a last group of one element joins the one before; `elements` is of one row."""
    sizes = group_sizes(samples, size)
    if len(sizes) > 1 and sizes[-1] * elements == 1:
        sizes[-2:] = [sizes[-2] + 1]
    return sizes


def example_group_of(x: Tensor, sizes: list[int]) -> Tensor:
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    return torch.tensor(groups, dtype=torch.long).view(-1, *[1] * (x.ndim - 1)).expand(x.shape)


def pair(a: Tensor, b: Tensor) -> Tensor:
    """A label for each pair of labels."""
    return a * 1000 + b


# ---- what is done with them ----------------------------------------------------------------------------------------


def normalize(x: Tensor, labels: Tensor, eps: float) -> Tensor:
    y = torch.zeros_like(x)
    for label in labels.unique():
        batch = x[labels == label]
        mean = batch.mean()
        var = (batch - mean).square().mean()
        y = torch.where(labels == label, (x - mean) / (var + eps).sqrt(), y)
    return y


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return x
    shape = (1, -1, *[1] * (x.ndim - 2))
    return x * weight.view(shape) + bias.view(shape)


class Reference:
    """BatchNorm; the other layers override which elements belong together."""

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float | None = 0.1, buffers: int | None = None):
        self.channels, self.eps, self.momentum = channels, eps, momentum
        self.mean = torch.zeros(buffers or channels, dtype=torch.float64)
        self.var = torch.ones(buffers or channels, dtype=torch.float64)
        self.steps = 0

    def batch_of(self, x: Tensor) -> Tensor:
        """The normalization batch of each element in training."""
        return channel_of(x)

    def buffer_of(self, x: Tensor) -> Tensor:
        """Which population statistics stand for an element."""
        return channel_of(x)

    def own_of(self, x: Tensor) -> Tensor:
        """Within a sample: the set whose moments example weighing mixes in."""
        return self.buffer_of(x)

    def features(self, x: Tensor) -> Tensor:
        """What is normalized over the batch."""
        return x

    def train(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        z = self.features(x)
        self.update(z.detach())
        return affine(normalize(z, self.batch_of(z), self.eps), weight, bias)

    def step_size(self) -> float:
        self.steps += 1
        return 1 / self.steps if self.momentum is None else self.momentum

    def update(self, z: Tensor) -> None:
        """As nn.BatchNorm: EMA of the mean and the unbiased variance of the whole batch."""
        m = self.step_size()
        for i in range(len(self.mean)):
            values = z[self.buffer_of(z) == i]
            self.mean[i] += m * (values.mean() - self.mean[i])
            self.var[i] += m * (values.var(correction=1) - self.var[i])

    def infer(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, alpha: float = 0.0) -> Tensor:
        """§10, literally: E[x] and E[x²] of the sample and of the population, mixed."""
        z = self.features(x)
        stored = self.buffer_of(z)
        stored_mean, stored_square = self.mean[stored], (self.var + self.mean.square())[stored]
        labels = pair(sample_of(z), self.own_of(z))
        y = torch.zeros_like(z)
        for label in labels.unique():
            here = labels == label
            mean = alpha * z[here].mean() + (1 - alpha) * stored_mean[here].mean()
            square = alpha * z[here].square().mean() + (1 - alpha) * stored_square[here].mean()
            y = torch.where(here, (z - mean) / (square - mean.square() + self.eps).sqrt(), y)
        return affine(y, weight, bias)


class GhostReference(Reference):
    def __init__(self, channels, samples_per_group=None, num_sample_groups=None, **options):
        super().__init__(channels, **options)
        self.samples_per_group, self.num_sample_groups = samples_per_group, num_sample_groups

    def batch_of(self, x):
        size = self.samples_per_group or math.ceil(x.shape[0] / self.num_sample_groups)
        sizes = ghost_sizes(x.shape[0], size, x.shape[2:].numel())
        return pair(example_group_of(x, sizes), channel_of(x))


class SeqReference(GhostReference):
    def __init__(self, channels, num_channel_groups, num_sample_groups, **options):
        super().__init__(channels, num_sample_groups=num_sample_groups, **options)
        self.num_channel_groups = num_channel_groups

    def features(self, x):
        return normalize(x, pair(sample_of(x), channel_group_of(x, self.num_channel_groups)), self.eps)


class GhostThenGroupReference(GhostReference):
    """SeqNorm in the other order."""

    def __init__(self, channels, num_channel_groups, num_sample_groups, group_norm_first=False, **options):
        super().__init__(channels, num_sample_groups=num_sample_groups, **options)
        self.num_channel_groups = num_channel_groups

    def train(self, x, weight, bias):
        return self.last(super().train(x, None, None), weight, bias)

    def infer(self, x, weight, bias, alpha=0.0):
        return self.last(super().infer(x, None, None, alpha), weight, bias)

    def last(self, x, weight, bias):
        groups = pair(sample_of(x), channel_group_of(x, self.num_channel_groups))
        return affine(normalize(x, groups, self.eps), weight, bias)


class BatchGroupReference(Reference):
    def __init__(self, channels, num_groups, **options):
        super().__init__(channels, buffers=num_groups, **options)

    def batch_of(self, x):
        return piece_of(x, len(self.mean))

    def buffer_of(self, x):
        return piece_of(x, len(self.mean))


class GroupedReference(Reference):
    def __init__(self, channels, num_channel_groups, samples_per_group, **options):
        super().__init__(channels, **options)
        self.num_channel_groups, self.samples_per_group = num_channel_groups, samples_per_group

    def batch_of(self, x):
        groups = example_group_of(x, group_sizes(x.shape[0], self.samples_per_group))
        return pair(groups, channel_group_of(x, self.num_channel_groups))

    def own_of(self, x):
        return channel_group_of(x, self.num_channel_groups)


class RenormReference(Reference):
    """Algorithm 1, with σ kept as running_var = σ² - eps."""

    def __init__(self, channels, r_max=3.0, d_max=5.0, samples_per_group=None, momentum=0.01, **options):
        super().__init__(channels, momentum=momentum, **options)
        self.r_max, self.d_max, self.samples_per_group = r_max, d_max, samples_per_group

    def train(self, x, weight, bias):
        r_max, d_max = limit(self.r_max, self.steps), limit(self.d_max, self.steps)
        sigma = (self.var + self.eps).sqrt()
        sizes = ghost_sizes(x.shape[0], self.samples_per_group or x.shape[0], x.shape[2:].numel())
        y = torch.zeros_like(x)
        for g in range(len(sizes)):
            for c in range(self.channels):
                here = (example_group_of(x, sizes) == g) & (channel_of(x) == c)
                mean = x[here].mean()
                std = (x[here].var(correction=0) + self.eps).sqrt()
                r = (std / sigma[c]).clamp(1 / r_max, r_max).detach()
                d = ((mean - self.mean[c]) / sigma[c]).clamp(-d_max, d_max).detach()
                y = torch.where(here, (x - mean) / std * r + d, y)
        self.update(x.detach(), sizes)
        return affine(y, weight, bias)

    def update(self, z, sizes):
        """σ is averaged as the micro-batches normalize by it, each by its number of samples."""
        m = self.step_size()
        groups = example_group_of(z, sizes)
        for c in range(self.channels):
            values = [z[(channel_of(z) == c) & (groups == g)] for g in range(len(sizes))]
            deviations = torch.stack([(own.var(correction=0) + self.eps).sqrt() for own in values])
            shares = torch.tensor(sizes, dtype=z.dtype) / sum(sizes)
            sigma = (self.var[c] + self.eps).sqrt()
            sigma = sigma + m * ((shares * deviations).sum() - sigma)
            self.mean[c] += m * (torch.cat(values).mean() - self.mean[c])
            self.var[c] = sigma.square() - self.eps


def limit(value, step: int) -> float:
    """r_max or d_max at a step: a number, a function of the step, or points joined by lines, constant outside."""
    if callable(value):
        return value(step)
    if isinstance(value, (int, float)):
        return value
    if step <= value[0][0]:
        return value[0][1]
    for (left, low), (right, high) in itertools.pairwise(value):
        if step <= right:
            return low + (high - low) * (step - left) / (right - left)
    return value[-1][1]
