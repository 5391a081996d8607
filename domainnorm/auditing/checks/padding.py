"""Padding that counts in a detector's statistics."""

from __future__ import annotations

from ..divergence import divergence, mean_of
from ..finding import Finding, Place
from ..seen import Seen


def check(seen: Seen) -> list[Finding]:
    """How far statistics with padding are from those without."""
    places, shares = [], {}
    for _, norm, sites in seen.layers():
        for s in sites:
            if s.unpadded is None or not norm.follows_batches:
                continue
            inner = s.unpadded
            value = mean_of(divergence(inner.mean, inner.var, s.own.mean, s.own.var, norm.eps))
            place = Place(norm.name, s.call if len({o.call for o in sites}) > 1 else None, None, value)
            shares[place] = sum(s.padded) / len(s.sizes)
            places.append(place)
    places = sorted((p for p in places if p.value >= seen.thresholds.padding), key=lambda p: -p.value)
    if not places:
        return []
    worst = places[0]
    return [
        Finding(
            "padding",
            "padding counts",
            "warning",
            f"{100 * shares[worst]:.0f}% of what {worst.layer} normalizes is padding, to the size of the largest "
            f"image of the batch: it moves the statistics by {worst.value:.2g} nats a channel.",
            worst.value,
            seen.thresholds.padding,
            "nats a channel",
            tuple(places),
            'Rethinking "Batch", 5',
            "batches of images of similar shape (torchvision's GroupedBatchSampler), or one size",
            "DATALOADER.ASPECT_RATIO_GROUPING True",
            {"share": shares[worst]},
        )
    ]
