"""Batches by class: what is in each, that every image has its turn, however a run is cut into ranks and resumes."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domainnorm.config import UserError
from domainnorm.data.class_sampler import ClassBatchSampler

KINDS = ("few_classes", "few_classes_in_rounds", "class_disjoint_halves")
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 4, 7], [5, 30, 17, 9, 40]))  # some labels have none


def sampler(batches, size=8, k=4, labels=LABELS, **options):
    classes = 0 if batches == "class_disjoint_halves" else k
    options = {"seed": 3, "with_replacement": False} | options
    return ClassBatchSampler(labels, size, batches=batches, classes_per_batch=classes, **options)


def first(source, count):
    return list(itertools.islice(source, count))


def indices(source, count):
    """The images of the first batches: int64 (count, images)."""
    return np.array([[index for index, _ in batch] for batch in first(source, count)])


@pytest.mark.parametrize("kind", KINDS[:2])
def test_each_chosen_class_has_its_exact_share(kind):
    chosen = []
    for batch in LABELS[indices(sampler(kind, size=12), 200)]:
        classes, counts = np.unique(batch, return_counts=True)
        assert len(classes) == 4 and (counts == 3).all()
        chosen.append(tuple(classes))
    assert len(set(chosen)) == 5  # all sets of 4 of the 5 classes


@pytest.mark.parametrize("kind", KINDS[:2])
def test_classes_are_drawn_with_replacement(kind):
    """As in both papers: each of 4 draws is any of the 5 classes, with 3 images, all different."""
    numbers = np.zeros((5, 5))  # of each class, how often it is drawn so many times
    batches = indices(sampler(kind, size=12, with_replacement=True), 2000)
    for images, batch in zip(batches, LABELS[batches], strict=True):
        for k, label in enumerate((0, 1, 2, 4, 7)):
            times, rest = divmod(int((batch == label).sum()), 3)
            assert rest == 0
            assert len({*images[batch == label].tolist()}) == min(3 * times, (label == LABELS).sum())
            numbers[k, times] += 1
    expected = [math.comb(4, n) * 0.2**n * 0.8 ** (4 - n) for n in range(5)]
    assert np.abs(numbers / 2000 - expected).max() < 0.03


def test_replacement_needs_no_more_classes_than_one():
    labels = np.zeros(20, int)
    assert indices(sampler("few_classes", labels=labels, with_replacement=True), 3).shape == (3, 8)
    with pytest.raises(UserError, match="needs 4 classes"):
        sampler("few_classes", labels=labels)


def test_few_classes_come_in_random_order():
    batches = LABELS[indices(sampler("few_classes"), 200)]
    assert any(len({*batch[:4].tolist()}) < 4 for batch in batches)
    firsts = np.bincount(batches[:, 0], minlength=8)
    assert firsts[[0, 1, 2, 4, 7]].min() > 15 and len({tuple(batch == batch[0]) for batch in batches}) > 6


def test_rounds_have_each_class_once_and_the_images_of_few_classes():
    rounds, plain = (indices(sampler(kind, size=12), 100) for kind in KINDS[1::-1])
    assert (np.sort(rounds) == np.sort(plain)).all() and (rounds != plain).any()
    orders = set()
    for batch in LABELS[rounds]:
        for turn in batch.reshape(3, 4).tolist():
            assert sorted(turn) == sorted({*batch.tolist()})
            orders.add(tuple(turn))
    assert len(orders) > 60  # of 120, in no fixed order


@given(st.integers(2, 9), st.sampled_from([2, 6, 16]), st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_halves_share_no_class(classes, size, seed):
    labels = np.arange(50) % classes
    for batch in labels[indices(sampler("class_disjoint_halves", size, labels=labels, seed=seed), 40)]:
        assert not {*batch[: size // 2].tolist()} & {*batch[size // 2 :].tolist()}


def test_either_half_may_hold_any_class():
    labels = np.repeat(np.arange(5), 12)
    batches = labels[indices(sampler("class_disjoint_halves", labels=labels), 600)]
    for half in (batches[:, :4], batches[:, 4:]):
        assert np.abs(np.bincount(half.reshape(-1)) / half.size - 1 / 5).max() < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_a_class_are_used_equally_often(kind):
    """Over all ranks, up to the permutation that each class is in."""
    streams = [indices(sampler(kind, rank=rank, world_size=3), 150) for rank in range(3)]
    used = np.bincount(np.concatenate(streams).reshape(-1), minlength=len(LABELS))
    for label in np.unique(LABELS):
        counts = used[label == LABELS]
        assert counts.min() > 5 and np.ptp(counts) <= 1


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12))
@settings(deadline=None)
def test_no_image_twice_in_a_normalization_batch_unless_its_class_is_too_small(classes, images, each):
    labels = np.repeat(np.arange(classes), images)
    for batch in indices(sampler("few_classes", classes * each, classes, labels), 12):
        used = np.bincount(batch, minlength=len(labels))
        assert used.max() == -(-each // images) and np.ptp(used) <= 1


def test_a_half_larger_than_its_classes_repeats_them_equally():
    labels = np.array([0, 0, 0, 1])
    for batch in indices(sampler("class_disjoint_halves", 12, labels=labels), 10):
        used = np.bincount(batch, minlength=4)
        assert used.tolist() == [2, 2, 2, 6]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_share_no_image_within_a_turn_of_the_smallest_class(kind):
    labels = np.arange(64) % 4
    streams = [indices(sampler(kind, labels=labels, rank=rank, world_size=4), 2) for rank in range(4)]
    assert len({*np.concatenate(streams).reshape(-1).tolist()}) == 64 or kind == "class_disjoint_halves"
    together = np.concatenate([stream[0] for stream in streams])
    assert len({*together.tolist()}) == 32


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_accumulation_cut_one_stream(kind):
    """Normalization batches are the same ones, with the same augmentation, on one rank or several, at once or not."""
    whole = first(sampler(kind), 24)
    for world_size, parts in ((3, 1), (1, 3), (2, 3)):
        ranks = [
            first(sampler(kind, rank=rank, world_size=world_size, parts=parts), 24 // (world_size * parts))
            for rank in range(world_size)
        ]
        steps = [batch for step in zip(*ranks, strict=True) for batch in step]
        cut = [batch[i : i + 8] for batch in steps for i in range(0, 8 * parts, 8)]
        assert cut == whole
    seeds = [seed for batch in whole for _, seed in batch]
    assert len({*seeds}) == len(seeds)  # no two augmentations are alike


@given(st.sampled_from(KINDS), st.integers(0, 30), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**40))
@settings(deadline=None, max_examples=60)
def test_resumed_equals_uninterrupted(kind, start, world_size, parts, seed):
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "parts": parts, "seed": seed}
        assert first(sampler(kind, **options), start + 4)[start:] == first(sampler(kind, start=start, **options), 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_twice_and_another_with_another_seed(kind):
    source = sampler(kind)
    assert first(source, 9) == first(source, 9) == first(sampler(kind), 9) != first(sampler(kind, seed=4), 9)


def test_order_is_pinned():
    """Resuming a run with a later version must continue its stream."""
    labels = np.arange(20) % 5
    found = [indices(sampler(kind, 4, 2, labels), 2).tolist() for kind in KINDS]
    assert found == [
        [[7, 15, 17, 5], [18, 10, 3, 0]],
        [[5, 17, 15, 7], [3, 0, 10, 18]],
        [[18, 4, 0, 5], [8, 7, 9, 15]],
    ]
    assert next(iter(sampler("few_classes", 4, 2, labels)))[0][1] == 8789938331783242616


@pytest.mark.parametrize(
    ("kind", "size", "k", "labels", "message"),
    [
        ("few_classes", 8, 3, LABELS, r"CLASSES_PER_BATCH 3 contradicts a normalization batch of 8 .* multiple of 3$"),
        ("few_classes", 6, 6, LABELS, r"CLASSES_PER_BATCH 6 needs 6 classes .* has 5; choose"),
        (
            "class_disjoint_halves",
            7,
            0,
            LABELS,
            r"BATCHES 'class_disjoint_halves' contradicts .* of 7 .* multiple of 2$",
        ),
        ("class_disjoint_halves", 8, 0, [2, 2, 2], r"BATCHES 'class_disjoint_halves' needs 2 classes .* has 1"),
    ],
)
def test_batches_that_cannot_be(kind, size, k, labels, message):
    with pytest.raises(UserError, match=message) as caught:
        sampler(kind, size, k, labels)
    assert "\n" not in str(caught.value)
