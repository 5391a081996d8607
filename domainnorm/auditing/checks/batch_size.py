"""Normalization batches that are too small, empty, or not alike on all ranks."""

from __future__ import annotations

import statistics

from ..finding import Finding, Place, counted, norm_key
from ..seen import Seen
from .calls import where

PAPER = 'Rethinking "Batch", 4.1 and 6.1, Table 2'
REMEDY = "dn.convert_batchnorm(model, 'SyncBN'), larger batches, or dn.convert_batchnorm(model, 'GroupNorm')"


def check(seen: Seen) -> list[Finding]:
    """Few samples, few elements, batches of one sample among larger ones, empty ones, ranks."""
    return [*_few(seen), *_single(seen), *_empty(seen), *_ranks(seen)]


def _few(seen: Seen) -> list[Finding]:
    samples, elements = [], []
    for _, norm, sites in seen.layers():
        if not norm.follows_batches or norm.is_corrected:
            continue
        ranks = seen.ranks_of(norm)
        for s in sites:
            place = where(norm, s) if len(sites) > 1 else (None, None)
            sizes = [size for size in s.sizes if size.elements]
            samples.append(Place(norm.name, *place, ranks * statistics.median(z.independent for z in sizes)))
            elements.append(Place(norm.name, *place, ranks * statistics.median(z.elements for z in sizes)))
    found = []
    limit = seen.thresholds.batch_samples
    if few := sorted((p for p in samples if p.value < limit), key=lambda p: p.value):
        worst = few[0]
        rois = [p.layer for p in few if _of_regions(seen, p.layer)]
        regions = (
            f" What {rois[0]} is given are RoIs of the same image{'' if worst.value < 2 else 's'}: shuffle them."
            if rois
            else ""
        )
        found.append(
            Finding(
                "batch_size",
                "few samples",
                "error" if worst.value < 2 else "warning",
                f"{_normalize(few)} {worst.value:g} independent sample{'' if worst.value == 1 else 's'} together, "
                f"such as {worst.layer}: the statistics say more of those samples than of the data.{regions}",
                worst.value,
                limit,
                "samples",
                tuple(few),
                PAPER,
                "dn.RoIShuffle(head), or " + REMEDY if rois else REMEDY,
                f"MODEL.ROI_HEADS.SHUFFLE True, {_keys(worst)}" if rois else _keys(worst),
            )
        )
    limit = seen.thresholds.batch_elements
    names = {p.layer for p in few}
    tiny = sorted((p for p in elements if p.value < limit and p.layer not in names), key=lambda p: p.value)
    if tiny:
        worst = tiny[0]
        found.append(
            Finding(
                "batch_size",
                "few elements",
                "warning",
                f"{_normalize(tiny)} {worst.value:g} elements of a channel together, such as {worst.layer}: a "
                f"variance of so few is off by {100 * (2 / max(worst.value, 2)) ** 0.5:.0f}%.",
                worst.value,
                limit,
                "elements",
                tuple(tiny),
                PAPER,
                REMEDY,
                _keys(worst),
            )
        )
    return found


def _normalize(places: list[Place]) -> str:
    number = len({place.layer for place in places})
    return f"{counted(number, 'layer')} normalize{'s' if number == 1 else ''}"


def _keys(place: Place) -> str:
    return f"{norm_key(place.layer)} SyncBN (or GN), SOLVER.IMS_PER_BATCH"


def _of_regions(seen: Seen, layer: str) -> bool:
    """Whether its rows are several of each image."""
    return any(z.samples > z.images for s in seen.own.values() if s.norm.name == layer for z in s.sizes)


def _single(seen: Seen) -> list[Finding]:
    """A batch of one sample, such as the last of an epoch, where others have more."""
    places = []
    for _, norm, sites in seen.layers():
        for s in sites if norm.follows_batches else ():
            sizes = [z.independent for z in s.sizes if z.elements]
            if min(sizes) == 1 < statistics.median(sizes) and norm.samples_per_group(max(sizes)) > 1:
                places.append(Place(norm.name, s.call if len(sites) > 1 else None, None, 1.0))
    if not places:
        return []
    return [
        Finding(
            "batch_size",
            "one sample",
            "warning",
            f"One of the batches has a single sample: {counted(len(places), 'layer')}, such as {places[0].layer}, "
            "take it for a batch, and their averages count it as much as a whole batch.",
            1.0,
            2.0,
            "samples",
            tuple(places),
            PAPER,
            "torch.utils.data.DataLoader(…, drop_last=True)",
            "",
        )
    ]


def _empty(seen: Seen) -> list[Finding]:
    places = []
    for (k, call, domain), s in seen.own.items():
        empty = sum(not size.elements for size in s.sizes)
        if empty and seen.norms[k].follows_batches:
            place_of_domain = domain if seen.norms[k].mean.shape[0] > 1 else None
            places.append(Place(seen.norms[k].name, call or None, place_of_domain, float(empty)))
    places.sort(key=lambda p: -p.value)
    if not places:
        return []
    worst = places[0]
    return [
        Finding(
            "batch_size",
            "empty batch",
            "warning",
            f"{worst.layer} met {worst.value:.0f} empty batches of {seen.batches}: torch's BatchNorm raises there in "
            "training or, synchronized, waits for ever.",
            worst.value,
            1.0,
            "batches",
            tuple(places),
            'Rethinking "Batch", App. A.6',
            "dn.convert_batchnorm(model, 'SyncBN'), which merges empty ranks exactly",
            "MODEL.ROI_BOX_HEAD.NORM SyncBN",
        )
    ]


def _ranks(seen: Seen) -> list[Finding]:
    """Ranks that normalize batches of different sizes, each on its own."""
    places = []
    for norm in seen.norms:
        sizes = [rank["samples"].get(norm.name) for rank in seen.ranks]
        known = [size for size in sizes if size is not None]
        if norm.follows_batches and seen.ranks_of(norm) == 1 and known and max(known) > 1.5 * min(known):
            places.append(Place(norm.name, value=max(known) / max(min(known), 0.5)))
    places.sort(key=lambda p: -p.value)
    if not places:
        return []
    worst = places[0]
    sizes = [rank["samples"].get(worst.layer) for rank in seen.ranks]
    return [
        Finding(
            "batch_size",
            "batches of ranks differ",
            "warning",
            f"The ranks normalize batches of different sizes: {worst.layer} those of {sizes} samples.",
            worst.value,
            1.5,
            "times",
            tuple(places),
            'Rethinking "Batch", App. A.6',
            "dn.convert_batchnorm(model, 'SyncBN'), which counts elements",
            f"{norm_key(worst.layer)} SyncBN",
        )
    ]
