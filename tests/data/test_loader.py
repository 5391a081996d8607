"""Loaders and samplers: which samples come, in what order, however a run is cut into workers, ranks and resumes."""

import itertools
import json
import multiprocessing
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from domainnorm.config import UserError, load_config
from domainnorm.data import CocoDataset, num_classes, train_loader
from domainnorm.data import test_loader as make_test_loader
from domainnorm.data.detection_sets import class_names
from domainnorm.data.sampler import TrainingBatchSampler, evaluation_indices

CATEGORIES = ({"id": 2, "name": "cat"}, {"id": 9, "name": "dog"})


def write(folder, count, categories=CATEGORIES, empty=(), seed=0, first_id=1):
    """A data set of small noise images, one in three wide; returns its name."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for i in range(count):
        height, width = (12, 20) if i % 3 == 0 else (16, 14)
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        images.append({"id": first_id + i, "file_name": f"{i}.png", "height": height, "width": width})
        if i not in empty:
            annotations.append(
                {"id": i, "image_id": first_id + i, "category_id": 9, "bbox": [1, 2, 6, 5], "iscrowd": 0}
            )
    contents = {"images": images, "annotations": annotations, "categories": list(categories)}
    (folder / "annotations.json").write_text(json.dumps(contents))
    return f"{folder / 'annotations.json'}:{folder / 'images'}"


@pytest.fixture
def name(tmp_path):
    return write(tmp_path / "a", 10)


def config(*names, **overrides):
    options = {
        "DATASETS.TRAIN": list(names),
        "SOLVER.IMS_PER_BATCH": 4,
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": [8, 10, 12, 17],
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(overrides=list(itertools.chain.from_iterable(options.items())))


def take(loader, count):
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for (images, targets), (other_images, other_targets) in zip(batches, others, strict=True):
        assert all(map(torch.equal, images, other_images))
        for target, other in zip(targets, other_targets, strict=True):
            assert target.keys() == other.keys()
            for key, value in target.items():
                assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]


# samplers

runs = st.fixed_dictionaries(
    {
        "count": st.integers(1, 23),
        "batch_size": st.integers(1, 5),
        "world_size": st.integers(1, 4),
        "seed": st.integers(0, 2**40),
    }
)


def samplers(count, batch_size, world_size, seed, **options):
    sizes = [(10, 10 + i % 3 - 1) for i in range(count)]
    return [
        TrainingBatchSampler(sizes, batch_size, seed=seed, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def first(sampler, count):
    """The first batches."""
    return list(itertools.islice(sampler, count))


def stream(sampler, count):
    """The samples of the first batches."""
    return list(itertools.chain.from_iterable(first(sampler, count)))


@given(runs, st.integers(1, 3))
@settings(deadline=None)
def test_each_epoch_has_each_index_once_over_the_ranks(run, epochs):
    streams = [stream(sampler, 70) for sampler in samplers(**run, group=False)]
    positions = run["count"] * epochs
    merged = [streams[p % run["world_size"]][p // run["world_size"]] for p in range(positions)]
    for epoch in range(epochs):
        indices = [index for index, _ in merged[epoch * run["count"] : (epoch + 1) * run["count"]]]
        assert sorted(indices) == list(range(run["count"]))
    assert len({seed for _, seed in merged}) == positions  # no two augmentations are alike


@given(runs, st.integers(0, 30), st.booleans())
@settings(deadline=None)
def test_resumed_equals_uninterrupted(run, start, group):
    for whole, resumed in zip(samplers(**run, group=group), samplers(**run, group=group, start=start), strict=True):
        assert first(whole, start + 5)[start:] == first(resumed, 5)


@given(runs)
@settings(deadline=None)
def test_grouping_only_reorders(run):
    """A batch is of one orientation; what the groups hold back is all that is missing from the plain stream."""
    for grouped, plain in zip(samplers(**run), samplers(**run, group=False), strict=True):
        batches = first(grouped, 20)
        for batch in batches:
            assert len(batch) == run["batch_size"] and len({index % 3 == 2 for index, _ in batch}) == 1
        samples = stream(plain, 20 + 2 * run["batch_size"])
        for wide in (False, True):
            came = [sample for batch in batches for sample in batch if (sample[0] % 3 == 2) == wide]
            expected = [sample for sample in samples if (sample[0] % 3 == 2) == wide]
            assert came[: len(expected)] == expected[: len(came)]


def test_seeds_and_epochs_give_other_orders():
    orders = [
        [index for index, _ in stream(sampler, 4)]
        for seed in (0, 1)
        for sampler in samplers(40, 20, 1, seed, group=False)
    ]
    assert len({tuple(order[k : k + 40]) for order in orders for k in (0, 40)}) == 4


def test_order_is_pinned():
    """Resuming a run with a later version must continue its stream."""
    (sampler,) = samplers(6, 3, 1, seed=5, group=False)
    assert first(sampler, 2) == [
        [(4, 7576354313457842240), (3, 7431708300349993923), (0, 5503585990081701751)],
        [(5, 8792215788303603411), (1, 624881333923516720), (2, 7045190013926336327)],
    ]


@given(st.integers(0, 50), st.integers(1, 12))
def test_evaluation_indices_partition(count, world_size):
    parts = [evaluation_indices(count, rank, world_size) for rank in range(world_size)]
    assert list(itertools.chain(*parts)) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# training


def test_batches(name):
    for images, targets in take(train_loader(config(name), rank=0, world_size=1), 6):
        assert len(images) == len(targets) == 4
        assert len({image.shape[2] > image.shape[1] for image in images}) == 1
        for image, target in zip(images, targets, strict=True):
            assert type(image) is torch.Tensor and image.dtype == torch.float32 and image.shape[0] == 3
            assert image.min() >= 0 and 0.5 < image.max() <= 1 and min(image.shape[1:]) in (8, 10, 12, 17)
            assert type(target["boxes"]) is torch.Tensor and target["boxes"].shape == (1, 4)
            assert target["labels"].tolist() == [1] and target["image_id"] in range(1, 11)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_workers_change_nothing(name, workers):
    alone = take(train_loader(config(name), rank=0, world_size=1), 7)
    cfg = config(name, DATALOADER__NUM_WORKERS=workers)
    assert_equal(alone, take(train_loader(cfg, rank=0, world_size=1), 7))


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_changes_nothing(name, workers):
    cfg = config(name, DATALOADER__NUM_WORKERS=workers)
    whole = take(train_loader(cfg, rank=1, world_size=2), 8)
    assert_equal(whole[5:], take(train_loader(cfg, rank=1, world_size=2, start_iteration=5), 3))


def test_ranks_take_what_one_process_takes(name):
    """The same samples, augmented in the same way, whatever the number of processes."""
    cfg = config(name, DATALOADER__ASPECT_RATIO_GROUPING=False)
    (together,) = take(train_loader(cfg, rank=0, world_size=1), 1)
    parts = [take(train_loader(cfg, rank=rank, world_size=2), 1)[0] for rank in (0, 1)]
    interleaved = tuple([parts[i % 2][k][i // 2] for i in range(4)] for k in (0, 1))
    assert_equal([together], [interleaved])


def test_augmentation_varies_and_follows_the_seed(name):
    def shapes(seed):
        batches = take(train_loader(config(name, SEED=seed), rank=0, world_size=1), 10)
        return [tuple(image.shape) for images, _ in batches for image in images]

    assert len(set(shapes(0))) == 8 and shapes(0) == shapes(0) != shapes(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generators_are_left_alone(name, workers):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    take(train_loader(config(name, DATALOADER__NUM_WORKERS=workers), rank=0, world_size=1), 3)
    assert states() == before


def test_several_data_sets(name, tmp_path):
    other = write(tmp_path / "b", 5, first_id=100)
    ids = {
        target["image_id"]
        for _, targets in take(train_loader(config(name, other), rank=0, world_size=1), 12)
        for target in targets
    }
    assert ids == {*range(1, 11), *range(100, 105)}


def test_data_sets_with_other_categories(name, tmp_path):
    swapped = write(tmp_path / "b", 2, categories=[{"id": 2, "name": "dog"}, {"id": 9, "name": "cat"}])
    with pytest.raises(UserError, match=r"\['cat', 'dog'\].*\['dog', 'cat'\]"):
        train_loader(config(name, swapped), rank=0, world_size=1)


def test_images_without_objects(tmp_path):
    name = write(tmp_path / "a", 8, empty={1, 2})

    def ids(**overrides):
        batches = take(train_loader(config(name, **overrides), rank=0, world_size=1), 12)
        return {target["image_id"] for _, targets in batches for target in targets}

    assert ids() == set(range(1, 9)) - {2, 3}
    assert ids(DATALOADER__FILTER_EMPTY_ANNOTATIONS=False) == set(range(1, 9))


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(UserError, match=r"^DATASETS.TRAIN is empty"):
        train_loader(config(), rank=0, world_size=1)
    name = write(tmp_path / "a", 2, empty={0, 1})
    with pytest.raises(UserError, match=r"no image remains.*FILTER_EMPTY_ANNOTATIONS"):
        train_loader(config(name), rank=0, world_size=1)
    assert len(take(train_loader(config(name, DATALOADER__FILTER_EMPTY_ANNOTATIONS=False), rank=0, world_size=1), 1))


def test_batch_sizes_that_cannot_be_shared(name):
    with pytest.raises(UserError, match=r"SOLVER.IMS_PER_BATCH 4 .* 3 processes .* multiple of 3"):
        train_loader(config(name), rank=0, world_size=3)
    with pytest.raises(UserError, match=r"SOLVER.IMS_PER_BATCH 4 .*SOLVER.ACCUMULATE 4.* multiple of 8"):
        train_loader(config(name, SOLVER__ACCUMULATE=4), rank=0, world_size=2)


# evaluation


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3, 12])
def test_evaluation_covers_every_image_once(name, world_size, workers):
    cfg = config(name, TEST__IMS_PER_BATCH=3, DATALOADER__NUM_WORKERS=workers)
    loaders = [make_test_loader(cfg, name, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(part) for part in batches]
    targets = [target for part in batches for _, targets in part for target in targets]
    assert [target["image_id"] for target in targets] == list(range(1, 11))
    images = [image for part in batches for images, _ in part for image in images]
    plain = CocoDataset(name)
    for i, image in enumerate(images):
        assert torch.equal((image * 255).round(), plain[i][0].float())
    assert all(len(images) <= 3 for part in batches for images, _ in part)


def test_evaluation_loader_can_be_read_twice_and_knows_its_data_set(name, tmp_path):
    empty = write(tmp_path / "b", 4, empty={0, 3})
    loader = make_test_loader(config(), empty, rank=0, world_size=1)
    assert len(list(loader)) == len(list(loader)) == 4  # images without objects are evaluated
    assert loader.dataset.category_ids == [2, 9] and loader.dataset.annotation_file == tmp_path / "b/annotations.json"


# mistakes met while loading


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_the_same_error_with_and_without_workers(name, tmp_path, workers):
    path = tmp_path / "a" / "images" / "3.png"
    path.write_bytes(path.read_bytes()[:200])
    cfg = config(name, DATALOADER__NUM_WORKERS=workers)
    for loader in (train_loader(cfg, rank=0, world_size=1), make_test_loader(cfg, name, rank=0, world_size=1)):
        with pytest.raises(UserError) as caught:
            take(iter(loader), 20)
        assert type(caught.value) is UserError
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert not multiprocessing.active_children()


def test_closing_ends_the_workers(name):
    loader = train_loader(config(name, DATALOADER__NUM_WORKERS=2), rank=0, world_size=1)
    next(loader)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert not multiprocessing.active_children()


# classes


def test_number_of_classes(name, tmp_path):
    three = write(tmp_path / "b", 1, categories=[*CATEGORIES, {"id": 11, "name": "cup"}])
    assert num_classes(config(name)) == 2
    assert num_classes(config(DATASETS__TEST=[three])) == 3
    assert num_classes(config(name, DATASETS__TEST=[three])) == 2
    with pytest.raises(UserError, match=r"DATASETS.TRAIN"):
        num_classes(config())
    with pytest.raises(UserError, match="no such file"):
        num_classes(config("coco_2017_val"))


@pytest.mark.parametrize(
    "info",
    [{}, {"info": {"categories": "two"}}, {"info": '"categories": [{"id": 1}]'}, {"é": {"categories": [3]}}],
)
@pytest.mark.parametrize("last", [True, False])
def test_categories_are_found_wherever_they_stand(tmp_path, info, last):
    parts = [info, {"images": [], "annotations": []}, {"categories": list(CATEGORIES)}]
    contents = {key: value for part in (parts if last else reversed(parts)) for key, value in part.items()}
    (tmp_path / "a.json").write_text(json.dumps(contents, ensure_ascii=False), encoding="utf-8")
    name = f"{tmp_path / 'a.json'}:{tmp_path}"
    assert class_names(name) == [category["name"] for category in CATEGORIES]
    for broken in ("", '{"categories": [', "[]"):
        (tmp_path / "a.json").write_text(broken)
        with pytest.raises(UserError, match=r"a\.json"):
            class_names(name)
