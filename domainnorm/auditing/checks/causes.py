"""What explains statistics that lag: so that one fault is named once, by its cause."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..divergence import divergence, mean_of
from ..norms import Norm
from ..seen import Seen
from ..site import SiteStatistics


def explained(seen: Seen) -> set[str]:
    """Names of layers of which another check says why their running statistics lag."""
    far = any(unknown(seen, norm, sites) for _, norm, sites in seen.layers())
    return {
        norm.name
        for _, norm, sites in seen.layers()
        if never_updated(norm)
        or is_unfinished(seen, norm)
        or in_average(seen, norm)
        or bool(broken_channels(norm).any())
        or (far and norm.mean.shape[0] > 1)
        or any(rounded(s) >= seen.thresholds.mean_over_std for s in sites)
    }


def broken_channels(norm: Norm) -> Tensor:
    """Which running statistics are no numbers, or variances below 0."""
    return ~(norm.mean.isfinite() & norm.var.isfinite()) | (norm.var < 0)


def rounded(site: SiteStatistics) -> float:
    """What rounding of a mean takes of a normalized value, the worst channel's."""
    unit = max(float(torch.finfo(dtype).eps) for dtype in site.dtypes)
    return float((site.own.mean.abs() / (site.own.var + site.norm.eps).sqrt()).max()) * unit


def never_updated(norm: Norm) -> bool:
    """Whether the statistics are still those of construction."""
    return norm.initial


def is_unfinished(seen: Seen, norm: Norm) -> bool:
    """Whether the initial statistics still count in the average."""
    left = initial_share(norm)
    return left is not None and norm.follows_batches and left >= seen.thresholds.unfinished


def initial_weight(norm: Norm) -> float | None:
    """How much the statistics before the first step weigh in the average; None: not known."""
    if not norm.tracked or norm.momentum is None:
        return None
    return (1 - norm.momentum) ** norm.tracked


def initial_share(norm: Norm) -> float | None:
    """How much of the running variances is that of the first step, the mean over channels; None: not known.

    Of the variance of construction, 1, a small weight is much of a variance that is smaller still. A running variance
    below that weight began with another.
    """
    if (weight := initial_weight(norm)) is None:
        return None
    share = weight / norm.var
    return mean_of(share.where((share <= 1) & (share >= weight), share.new_tensor(weight)))


def in_average(seen: Seen, norm: Norm) -> bool:
    """Whether it is of a model of averaged weights."""
    names = (name for name, module in seen.model.named_modules() if _is_average(module))
    return norm.follows_batches and any(name == "" or norm.name.startswith(f"{name}.") for name in names)


def _is_average(module: nn.Module) -> bool:
    return isinstance(module, AveragedModel) or type(module).__name__.startswith("ModelEma")  # timm's


def unknown(seen: Seen, norm: Norm, sites: list[SiteStatistics]) -> list[tuple[SiteStatistics, float, int]]:
    """Sites that are far from all domains and nearer to another one than to their own: divergence, and which that is.

    If each batch has samples of all domains, as a head has of all pyramid levels, no sample is of a new domain.
    """
    domains = norm.mean.shape[0]
    levels = len({s.domain for s in sites}) == domains and all(len(s.sizes) == seen.batches for s in sites)
    if domains == 1 or levels:
        return []
    apart = ((s, *distance(s)) for s in sites)
    return [found for found in apart if found[1] >= seen.thresholds.far_domain and found[2] != found[0].domain]


def distance(site: SiteStatistics) -> tuple[float, int]:
    """Divergence of what a site is given from the nearest domain, beyond sampling, and which that is."""
    norm = site.norm
    ways = divergence(site.own.mean, site.own.var, norm.mean, norm.var, norm.eps).mean(1)
    nearest = int(ways.argmin())
    return float(ways[nearest]) - 2 * mean_of(site.expected()), nearest
