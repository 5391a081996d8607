"""Several data sets in one stream of batches: exact shares, domains as asked for, however a run is cut."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domainnorm.data.sampler import TrainingBatchSampler
from domainnorm.data.set_sampler import SetBatchSampler, spread

COMPOSITIONS = ("mixed", "one_domain_per_rank", "one_domain_per_batch")
CUTS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)]  # ranks, parts
COUNTS = (8, 13, 30)
DOMAINS = (0, 1, 0)
RATIOS = (2.0, 3.0, 1.0)
SET = np.repeat(np.arange(3), COUNTS)  # of each index
WIDE = np.random.default_rng(0).random(51) < np.array([0.5, 0.2, 0.4])[SET]
DOMAIN = np.array(DOMAINS)[SET]


def samplers(world_size=1, composition="mixed", size=4, group=False, ratios=RATIOS, domains=DOMAINS, **options):
    wide = np.split(WIDE & group, np.cumsum(COUNTS)[:-1])
    options = {"seed": 3, "composition": composition, "world_size": world_size} | options
    return [
        SetBatchSampler(wide, size, ratios=ratios, domains=domains, rank=rank, **options) for rank in range(world_size)
    ]


def first(source, count):
    return list(itertools.islice(source, count))


def parts(steps, world_size, parts, **options):
    """Indices of the first steps: int64 (steps, parts, ranks, size)."""
    ranks = [
        [[index for index, _ in batch] for batch in first(sampler, steps)]
        for sampler in samplers(world_size, parts=parts, **options)
    ]
    return np.array(ranks).reshape(world_size, steps, parts, -1).transpose(1, 2, 0, 3)


# shares


def one_by_one(shares, count):
    """The sequence of `spread`, slowly: always what is due first."""
    taken = [0] * len(shares)
    for _ in range(count):
        choice = min(range(len(shares)), key=lambda i: (taken[i] + 0.5) / shares[i])
        yield choice, taken[choice]
        taken[choice] += 1


weights = st.lists(st.one_of(st.integers(1, 9).map(float), st.floats(1e-3, 1e3)), min_size=1, max_size=6)


@given(weights, st.integers(0, 300), st.integers(0, 40))
@settings(deadline=None)
def test_any_window_is_that_of_the_whole_sequence(weights, start, length):
    shares = np.array(weights) / sum(weights)
    chosen, numbers = spread(shares, start, start + length)
    assert list(zip(chosen, numbers, strict=True)) == list(one_by_one(shares, start + length))[start:]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 10**9))
def test_each_cycle_of_the_ratios_has_their_exact_counts(weights, cycle):
    total = sum(weights)
    chosen, numbers = spread(np.array(weights) / total, cycle * total, (cycle + 1) * total)
    assert np.bincount(chosen).tolist() == weights
    for choice, count in enumerate(weights):
        assert numbers[chosen == choice].tolist() == [*range(cycle * count, (cycle + 1) * count)]


def test_a_mixed_step_has_the_ratios():
    for cut in CUTS:
        for step in SET[parts(20, *cut, size=12 // (cut[0] * cut[1]))]:
            assert np.bincount(step.reshape(-1)).tolist() == [4, 6, 2]


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_sets_have_their_ratios_and_their_images_equal_use(composition, cut, group):
    used = np.bincount(parts(240, *cut, composition=composition, group=group).reshape(-1), minlength=51)
    expected = used.sum() * np.array(RATIOS) / sum(RATIOS)
    step = 4 * cut[0] * cut[1]
    assert np.abs(np.bincount(SET, used) - expected).max() <= (4 * step if group else step)
    for data_set in range(3):
        for wide in (False, True):
            assert np.ptp(used[(data_set == SET) & (wide == WIDE)]) <= 2  # 1, and 1 for the unfinished step
        by_orientation = [used[(data_set == SET) & (wide == WIDE)].mean() for wide in (False, True)]
        assert abs(by_orientation[1] / by_orientation[0] - 1) < 0.15


def test_numbers_of_images_as_ratios_are_epochs():
    used = parts(51, 1, 1, ratios=COUNTS, size=2)[..., 0, 0, :]
    assert np.bincount(used.reshape(-1)).tolist() == [2] * 51
    used = parts(51, 1, 1, ratios=COUNTS, size=1, composition="one_domain_per_batch")
    assert np.bincount(used.reshape(-1)).tolist() == [1] * 51


# domains


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_each_normalization_batch_is_of_one_domain_and_orientation(composition, cut, group):
    found = parts(60, *cut, composition=composition, group=group)
    domains, wide = DOMAIN[found], WIDE[found]
    assert ((wide == wide[..., :1]).all()) == group
    of_part = (domains == domains[..., :1]).all()
    of_step = (domains == domains[:, :1, :1, :1]).all()
    assert (of_part, of_step) == {
        "mixed": (False, False),
        "one_domain_per_rank": (True, cut == (1, 1)),
        "one_domain_per_batch": (True, True),
    }[composition]
    for rank in range(cut[0]):  # each sees all domains
        share = (domains[:, :, rank] == 1).mean()
        assert abs(share - 0.5) < 0.25
    if group:
        assert 0 < wide.mean() < 1 and all(0 < wide[domains == k].mean() < 1 for k in (0, 1))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_as_many_ranks_as_equal_domains_have_one_each_and_exchange_them(accumulate):
    found = parts(
        300, 3, accumulate, composition="one_domain_per_rank", domains=(0, 1, 2), ratios=(1, 1, 1), group=True
    )
    turns = SET[found][..., 0].reshape(-1, 3)  # (turn, rank)
    assert (np.sort(turns) == [0, 1, 2]).all()
    assert len({tuple(turn) for turn in turns.tolist()}) == 6
    for rank in range(3):
        assert np.abs(np.bincount(turns[:, rank]) / len(turns) - 1 / 3).max() < 0.1


def test_domains_of_steps_follow_the_ratios_of_their_sets():
    found = DOMAIN[parts(24, 2, 2, composition="one_domain_per_batch", ratios=(2, 1, 1))][:, 0, 0, 0]
    assert all(np.bincount(cycle).tolist() == [3, 1] for cycle in found.reshape(-1, 4))


def test_ranks_share_the_sets():
    """No rank has one set only, where positions and sets would beat in time."""
    found = SET[parts(60, 2, 1, ratios=(1, 1, 1e-9), size=1)]
    assert all({*found[:, :, rank].reshape(-1).tolist()} == {0, 1} for rank in (0, 1))


# cut and resumed


@pytest.mark.parametrize("composition", ["mixed", "one_domain_per_batch"])
def test_a_step_has_the_same_images_however_it_is_cut(composition):
    def steps(world_size, parts):
        ranks = samplers(world_size, composition, size=12 // (world_size * parts), parts=parts)
        return [sorted(itertools.chain(*step)) for step in zip(*(first(rank, 30) for rank in ranks), strict=True)]

    assert all(steps(*cut) == steps(1, 1) for cut in CUTS)


@pytest.mark.slow
@given(
    st.sampled_from(COMPOSITIONS), st.sampled_from(CUTS), st.booleans(), st.integers(0, 10**6), st.integers(0, 2**40)
)
@settings(deadline=None, max_examples=60)
def test_resumed_equals_uninterrupted(composition, cut, group, start, seed):
    options = {"composition": composition, "group": group, "parts": cut[1], "seed": seed}
    for middle in (3, start):
        begun = [first(sampler, 6)[3:] for sampler in samplers(cut[0], start=middle, **options)]
        assert begun == [first(sampler, 3) for sampler in samplers(cut[0], start=middle + 3, **options)]
    whole, resumed = samplers(cut[0], **options), samplers(cut[0], start=5, **options)
    assert [first(sampler, 8)[5:] for sampler in whole] == [first(sampler, 3) for sampler in resumed]


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_no_two_augmentations_are_alike(composition, group):
    ranks = samplers(2, composition, group=group, parts=2)
    seeds = [seed for rank in ranks for batch in first(rank, 60) for _, seed in batch]
    assert len({*seeds}) == len(seeds) == 960


def test_the_same_twice_and_another_with_another_seed():
    for composition in COMPOSITIONS:
        (source,), (again,), (other,) = (samplers(composition=composition, seed=seed) for seed in (3, 3, 4))
        assert first(source, 9) == first(source, 9) == first(again, 9) != first(other, 9)


def test_order_is_pinned():
    """Resuming a run with a later version must continue its stream."""
    expected = {
        "mixed": [[9, 7, 0], [14, 5, 4], [20, 2, 1]],
        "one_domain_per_rank": [[2, 1, 3], [11, 15, 20], [14, 18, 10]],
        "one_domain_per_batch": [[7, 23, 49], [11, 15, 20], [28, 6, 29]],
    }
    for composition, batches in expected.items():
        found = first(samplers(2, composition, size=3, group=True)[1], 3)
        assert [[index for index, _ in batch] for batch in found] == batches
    assert next(iter(samplers()[0]))[0] == (13, 8500753011714785339)


def test_the_stream_of_sets_without_ratios_and_composition_is_as_it_was():
    """37 images, in two orders, come in the batches that came before there were ratios."""
    found = hashlib.sha256()
    sizes = [(10, 9 + i % 3) for i in range(37)]
    for group, world_size in itertools.product((False, True), (1, 2, 3)):
        for rank, start in itertools.product(range(world_size), (0, 7)):
            place = {"rank": rank, "world_size": world_size, "start": start}
            found.update(repr(first(TrainingBatchSampler(sizes, 4, seed=11, group=group, **place), 25)).encode())
    assert found.hexdigest() == "2752fdf19f0543c3f3038d86b68f9c6c693849f3d80bf45e7596c6effa124e50"
