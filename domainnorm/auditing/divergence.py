"""How far two sets of statistics are apart, in nats a channel, and how far they would be by chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FEW = 1.0  # samples that the prior of the variance between samples counts as
_PRIOR_OF_MEANS, _PRIOR_OF_VARIANCES = 0.25, 0.5  # that variance, of a sample's mean and its variance, over the whole


def divergence(mean: Tensor, var: Tensor, of_mean: Tensor, of_var: Tensor, eps: float) -> Tensor:
    """The Kullback-Leibler divergence of a normal distribution from another one, of each channel.

    With `eps` in both variances, as the layer has it: a channel that does not vary at all is no infinite distance away.
    """
    ratio = (var + eps) / (of_var + eps)
    return 0.5 * (ratio + (mean - of_mean).square() / (of_var + eps) - 1 - ratio.log())


def inconsistency(mean: Tensor, var: Tensor, of_mean: Tensor, of_var: Tensor, eps: float) -> Tensor:
    """The mean square of what one element's normalized value changes by, of each channel.

    Between normalizing by its own moments, after which the mean square is 1, and by others.
    """
    scale = ((var + eps) / (of_var + eps)).sqrt()
    return (scale - 1).square() + (mean - of_mean).square() / (of_var + eps)


def variance_between(var_of_means: Tensor, var: Tensor, samples: float) -> Tensor:
    """The variance of samples' means around that of all, estimated from few samples too, of each channel.

    Args:
        var_of_means: as found, biased.
        var: of all elements.
        samples: how many there were.
    """
    return (var_of_means * samples + _FEW * _PRIOR_OF_MEANS * var) / (samples - 1 + _FEW)


def variance_of_squares(var_of_squares: Tensor, var: Tensor, samples: float) -> Tensor:
    """The variance of samples' mean squared deviations, likewise."""
    return (var_of_squares * samples + _FEW * _PRIOR_OF_VARIANCES * var.square()) / (samples - 1 + _FEW)


def noise(between: Tensor, of_squares: Tensor, var: Tensor, eps: float, samples: float) -> Tensor:
    """The divergence that moments of so many samples have from the true ones in expectation, of each channel.

    To second order, KL is half of (Δμ)²/σ² + ½(Δσ²)²/σ⁴.
    """
    whole = var + eps
    return 0.5 * (between / whole + 0.5 * of_squares / whole.square()) / samples


def seldom(between: float, within: float, deviations: float = 3.0) -> float:
    """What Fisher's F of so many degrees of freedom exceeds as seldom as a normal variable so many deviations.

    By Paulson's approximation, in which the cube root of F is nearly normal; inf where there are too few.
    """
    if between <= 0 or within <= 0:
        return float("inf")
    s, t = 2 / (9 * between), 2 / (9 * within)
    a, b, z = 1 - t, 1 - s, deviations**2
    if (scale := a * a - z * t) <= 0:
        return float("inf")
    return ((a * b + (a * a * b * b - scale * (b * b - z * s)) ** 0.5) / scale) ** 3


def alike(distances: Tensor, threshold: float) -> list[list[int]]:
    """Groups of items whose distances, `(K, K)`, are at most `threshold`, each in order.

    An item joins the group whose farthest member is nearest to it (complete linkage).
    """
    groups: list[list[int]] = [[k] for k in range(distances.shape[0])]
    while len(groups) > 1:
        pairs = [
            (max(float(distances[i, j]) for i in one for j in other), a, b)
            for a, one in enumerate(groups)
            for b, other in enumerate(groups[:a])
        ]
        farthest, a, b = min(pairs)
        if farthest > threshold:
            break
        groups[b] = sorted(groups[b] + groups.pop(a))
    return sorted(groups)


def pairwise(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """The symmetrized divergences `(K, K)`, means over channels, of statistics `(K, C)`."""
    ways = divergence(mean[:, None], var[:, None], mean[None], var[None], eps).mean(2)
    return (ways + ways.T) / 2


def ranges(numbers: Sequence[int]) -> str:
    """`0-2, 5` for [0, 1, 2, 5]."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def mean_of(values: Tensor) -> float:
    """Over channels; nan where there is none."""
    return float(torch.nanmean(values)) if values.numel() else float("nan")
