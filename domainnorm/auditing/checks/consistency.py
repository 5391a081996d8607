"""What a model predicts under minibatch and under population statistics."""

from __future__ import annotations

from ..divergence import mean_of
from ..finding import Finding, Place
from ..seen import Seen

PAPER = 'Rethinking "Batch", 3.1 and 4, Fig. 5'


def check(seen: Seen) -> list[Finding]:
    """The change of the output, less what batches of that size explain, and the layers that it comes from."""
    places, alone, chance = [], 0.0, 0.0
    for _, norm, sites in seen.layers():
        if norm.follows_batches and not norm.is_corrected:
            for s in sites:
                own, expected = mean_of(s.alone()), mean_of(s.alone_expected())
                alone, chance = alone + own, chance + min(own, expected)
                call = s.call if len(sites) > 1 else None
                places.append(Place(norm.name, call, s.domain if norm.mean.shape[0] > 1 else None, own - expected))
    places.sort(key=lambda p: -p.value)
    if not seen.output or not alone:
        return []
    share = 1 - chance / alone
    value = seen.output.value * share**0.5
    if value < seen.thresholds.consistency or share < 0.5:
        return []
    worst = places[0]
    alone_at = {seen.norms[k].name: change for k, change in seen.alone.items()}
    tail = "".join(f" {name} alone changes the output by {100 * v:.0f}%." for name, v in alone_at.items())
    return [
        Finding(
            "consistency",
            "train/test inconsistency",
            "error" if value >= 2 * seen.thresholds.consistency else "warning",
            f"The model's output changes by {100 * seen.output.value:.0f}% between minibatch statistics, as in "
            "training, and population statistics, as in inference; batches of this size explain "
            f"{100 * (1 - share):.0f}% of that change. Most of it begins at {worst.layer}.{tail}",
            value,
            seen.thresholds.consistency,
            "relative change",
            tuple(p for p in places[:20] if p.value > 0),
            PAPER,
            "dn.set_statistics(dn.convert_batchnorm(model, 'DomainBatchNorm'), 'minibatch'), to compare; then repair "
            "what is found beside this",
            'TEST.STATISTICS "[population, minibatch]"',
            {"changed_alone": alone_at, "output_change": seen.output.value, "chance": 1 - share},
        )
    ]
