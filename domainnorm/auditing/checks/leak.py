"""Predictions of training mode that depend on which other samples share the normalization batch."""

from __future__ import annotations

from ..finding import Finding, Place
from ..leak import Leak
from ..seen import Seen

PAPER = 'Rethinking "Batch", 6.1 and 6.2, Tables 3 and 6, Fig. 8'


def check(seen: Seen) -> list[Finding]:
    """Given batches against random mixes of their samples, if those were asked for."""
    if seen.leak is None:
        return []
    value, is_significant = seen.leak.effect()
    given, mixed, differs = seen.leak.change()
    unit = f"of the {seen.leak.measure}"
    if value != value:  # of what the model returns it is not known what is better
        value, is_significant, unit = -(max(0.0, given**2 - mixed**2) ** 0.5), differs, "relative change"
    if not is_significant or abs(value) < seen.thresholds.leak:
        return []
    places = _places(seen)
    regions = any(size.samples > size.images for s in seen.own.values() for size in s.sizes)
    remedy = "torch.utils.data.DataLoader(…, shuffle=True), or dn.GhostBatchNorm(…) with groups of disjoint classes"
    return [
        Finding(
            "leak",
            "uses batch mates" if value > 0 else "batches are not mixed",
            "error" if value >= 3 * seen.thresholds.leak else "warning",  # below 0, nothing was learned of it
            _message(seen.leak, value, places),
            abs(value),
            seen.thresholds.leak,
            unit,
            tuple(places[:20]),
            PAPER,
            "dn.RoIShuffle(head), trained on several processes" if regions else remedy,
            "MODEL.ROI_HEADS.SHUFFLE True" if regions else "DATALOADER.BATCHES iid, or MODEL.BACKBONE.NORM GhostBN",
            seen.leak.figures(),
        )
    ]


def _message(leak: Leak, value: float, places: list[Place]) -> str:
    figures = leak.figures()
    given, mixed = (figures[f"{leak.measure}_{what}"] for what in ("given", "mixed"))
    where = f" The batches differ most at {places[0].layer}." if places else ""
    means = f"the {leak.measure} is {given:.3g}, and {mixed:.3g} where their samples are mixed"
    if value > 0:
        return (
            f"The model has learned to read the other samples of its batch, which inference does without: in the given "
            f"batches {means}.{where}"
        )
    change = f"by {100 * figures['change_given']:.0f}%, and by {100 * figures['change_mixed']:.0f}% between two mixes"
    worse = f": {means}" if given == given else ""
    return (
        "The batches are no random mixes of their samples, and training normalizes by them: that changes the "
        f"predictions {change}{worse}.{where}"
    )


def _places(seen: Seen) -> list[Place]:
    """Layers whose batches differ more than random ones would, the most first."""
    places = []
    for site, s in seen.own.items():
        if s.total is None or not s.norm.follows_batches or s.norm.is_corrected:
            continue
        other = seen.inference.get(site)
        value = max(s.between_batches(), other.between_batches() if other is not None else 1.0)
        places.append(Place(s.norm.name, site[1] if len(seen.sites(site[0])) > 1 else None, None, value))
    return sorted((place for place in places if place.value > 1.5), key=lambda place: -place.value)
