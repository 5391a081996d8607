"""Data sets of classes: every way to give one, every mistake in one, and the batches a config makes of them."""

import gzip
import itertools
import multiprocessing
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from domainnorm.config import UserError, load_config
from domainnorm.data import ClassificationDataset, num_classes, train_loader
from domainnorm.data import test_loader as make_test_loader
from domainnorm.data.patches import COUNTS, VERSION, patches_file
from domainnorm.data.scene import CLASSES, PATCH_SIDE
from domainnorm.data.transforms import classifier_test_transforms, classifier_train_transforms

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (30, 12, 10), dtype=np.uint8)
LABELS = np.arange(30) % 3


def npz(file, images=RGB, labels=LABELS, **others):
    np.savez(file, images=images, labels=labels, **others)
    return str(file)


def idx(file, array, pack=bytes):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    file.write_bytes(pack(header + array.astype(np.uint8).tobytes()))
    return str(file)


def folder(root, images=RGB, labels=LABELS, classes=("ant", "bee", "cat")):
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (root / classes[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / classes[label] / f"{i:03}.png")
    return str(root)


@pytest.fixture
def name(tmp_path):
    return npz(tmp_path / "a.npz")


def config(*names, **overrides):
    options = {
        "MODEL.META_ARCHITECTURE": "Classifier",
        "DATASETS.TRAIN": list(names),
        "SOLVER.IMS_PER_BATCH": 6,
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.CROP": "padded",
        "INPUT.CROP_SIZE": 16,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(overrides=list(itertools.chain.from_iterable(options.items())))


def take(loader, count):
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for (images, targets), (other_images, other_targets) in zip(batches, others, strict=True):
        assert all(map(torch.equal, images, other_images)) and targets == other_targets


def unit(image):
    """From bytes to [0, 1]."""
    return v2.functional.to_dtype(image, torch.float32, scale=True)


def message_of(function, *args, **options):
    """The one line of the UserError it raises."""
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value) and type(caught.value) is UserError
    return str(caught.value)


# what is in them


def test_archive(tmp_path):
    dataset = ClassificationDataset(npz(tmp_path / "a.npz", class_names=["x", "y", "z", "none such"]))
    assert dataset.class_names == ["x", "y", "z", "none such"] and dataset.labels.tolist() == LABELS.tolist()
    assert len(dataset) == 30 and dataset.labels.dtype == torch.int64
    for i in (0, 29):
        image, target = dataset[i]
        assert type(image) is tv_tensors.Image and image.dtype == torch.uint8
        assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(RGB[i]))
        assert target["labels"].dtype == torch.int64 and target["labels"].shape == ()
        assert target == {"labels": LABELS[i], "image_id": i, "file_name": f"a.npz[{i}]"}


def test_without_class_names_they_are_numbers(tmp_path):
    assert ClassificationDataset(npz(tmp_path / "a.npz", labels=LABELS.astype(np.uint8))).class_names == ["0", "1", "2"]


def test_changing_an_image_does_not_change_the_data_set(tmp_path):
    for images in (RGB, GREY, GREY[:, :1, :1]):
        dataset = ClassificationDataset(npz(tmp_path / "a.npz", images))
        before = dataset[0][0].clone()
        dataset[0][0].add_(1)
        assert torch.equal(dataset[0][0], before)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx(tmp_path, pack):
    images, labels = (idx(tmp_path / f"{key}-ubyte", a, pack) for key, a in (("images", GREY), ("labels", LABELS)))
    dataset = ClassificationDataset(f"{images}:{labels}")
    assert dataset.class_names == ["0", "1", "2"] and dataset.labels.tolist() == LABELS.tolist()
    image, target = dataset[7]
    assert torch.equal(image, torch.from_numpy(GREY[7]).expand(3, 12, 10))
    assert target == {"labels": 1, "image_id": 7, "file_name": "images-ubyte[7]"}


def test_folder(tmp_path):
    (tmp_path / "top:level").mkdir()
    dataset = ClassificationDataset(folder(tmp_path / "top:level"))
    assert dataset.class_names == ["ant", "bee", "cat"] and dataset.labels.tolist() == sorted(LABELS.tolist())
    image, target = dataset[11]
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(RGB[4]))
    assert target == {"labels": 1, "image_id": 11, "file_name": "bee/004.png"}


def test_grey_images_have_three_channels(tmp_path):
    sets = [ClassificationDataset(source) for source in (npz(tmp_path / "a.npz", GREY), folder(tmp_path / "b", GREY))]
    for dataset, i in zip(sets, (3, 1), strict=True):  # the second of its class
        assert torch.equal(dataset[i][0], torch.from_numpy(GREY[3]).expand(3, 12, 10))


def test_transforms_are_of_the_image(name):
    image, target = ClassificationDataset(name, v2.CenterCrop(4))[3]
    assert torch.equal(image, ClassificationDataset(name)[3][0][:, 6:10, 6:10]) and target["labels"] == 0


# the built-in set


def patches(split, count=200):
    return ClassificationDataset(str(patches_file(f"patches_{split}", count)))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAINNORM_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_patches():
    dataset = patches("train")
    assert dataset.class_names == list(CLASSES) and dataset[0][0].shape == (3, PATCH_SIDE, PATCH_SIDE)
    assert np.bincount(dataset.labels).min() > 30
    assert len({image.numpy().tobytes() for image, _ in (*dataset, *patches("val"))}) == 400
    assert COUNTS == {"patches_train": 4000, "patches_val": 1000}


def test_patches_are_generated_once_under_their_name(cache, monkeypatch):
    monkeypatch.setitem(COUNTS, "patches_val", 5)
    dataset = ClassificationDataset("patches_val")
    (file,) = (cache / f"patches-v{VERSION}").iterdir()  # and no drafts
    assert file.name == "patches_val.npz" and len(dataset) == 5 and file.stat().st_mode & 0o044 == 0o044
    before = file.stat().st_mtime_ns
    assert len(ClassificationDataset("patches_val")) == 5 and file.stat().st_mtime_ns == before


def test_patches_are_the_same_bytes_twice_and_a_smaller_set_is_the_beginning(cache, monkeypatch):
    first = patches_file("patches_train", 12)
    few = np.load(patches_file("patches_train", 3))
    monkeypatch.setenv("DOMAINNORM_DATA", str(cache / "again"))
    second = patches_file("patches_train", 12)
    assert first != second and first.read_bytes() == second.read_bytes()
    for key in ("images", "labels"):
        assert np.array_equal(np.load(first)[key][:3], few[key])


def test_patches_are_the_known_ones():
    """Guards against a change of the drawing without a new VERSION. Pixels may differ by rounding between platforms."""
    dataset = patches("train", 12)
    assert dataset.labels.tolist() == [3, 2, 3, 2, 1, 2, 1, 3, 1, 1, 1, 0]
    assert [round(dataset[i][0].float().mean().item()) for i in range(6)] == [82, 107, 107, 90, 89, 93]


def test_colour_is_a_hint_and_no_answer():
    """The nearest class mean of the images' mean colours is right more often than chance, but far from always."""
    train, val = (
        (torch.stack([image.float().mean((1, 2)) for image, _ in dataset]), dataset.labels)
        for dataset in (patches("train", 600), patches("val", 300))
    )
    means = torch.stack([train[0][train[1] == label].mean(0) for label in range(4)])
    right = (torch.cdist(val[0], means).argmin(1) == val[1]).float().mean()
    assert 0.3 < right < 0.7


def test_patches_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DOMAINNORM_DATA", str(tmp_path / "file"))
    assert re.search(
        "^data set patches_val: cannot be written.*DOMAINNORM_DATA", message_of(patches_file, "patches_val")
    )


# mistakes


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": RGB.astype(np.float32)}, r"images are float32 of shape \(30, 16, 16, 3\); expected uint8"),
        ({"images": RGB[..., :2]}, r"shape \(30, 16, 16, 2\); expected uint8 of shape \(N, H, W\), grey"),
        ({"images": RGB[0, 0]}, r"shape \(16, 3\); expected"),
        ({"images": RGB[:0], "labels": LABELS[:0]}, r"has no images"),
        ({"images": RGB[:, :0]}, r"images of no pixels \(shape \(30, 0, 16, 3\)\)"),
        ({"labels": LABELS[:29]}, r"labels are int64 of shape \(29,\); expected integers of shape \(30,\)"),
        ({"labels": LABELS[:, None]}, r"labels are int64 of shape \(30, 1\)"),
        ({"labels": LABELS.astype(float)}, r"labels are float64"),
        ({"labels": LABELS > 1}, r"labels are bool"),
        ({"labels": LABELS - 1}, r"labels are from -1 to 1; expected from 0 to"),
        ({"labels": LABELS + 2**40}, r"labels are from 1099511627776 to 1099511627778; expected from 0 to at most"),
        ({"class_names": ["x", "y"]}, r"labels are from 0 to 2; expected from 0 to 1, positions in class_names"),
        ({"class_names": ["x", "y", "x"]}, r"class_names are .*; expected a list of different strings"),
        ({"class_names": [1, 2, 3]}, r"class_names are int64 of shape \(3,\)"),
        ({"class_names": np.array(["x", None, 3], dtype=object)}, r"cannot be read .* no Python objects"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, arrays, message):
    name = npz(tmp_path / "a.npz", **arrays)
    assert re.search(message, found := message_of(ClassificationDataset, name)) and found.startswith(name)


def test_broken_archives(tmp_path, name):
    content = (tmp_path / "a.npz").read_bytes()
    cases = {
        "truncated": (content[: len(content) // 2], "cannot be read"),
        "flipped": (content[:2000] + b"broken" + content[2006:], "cannot be read .*CRC"),
        "empty": (b"", "cannot be read"),
        "text": (b"no archive", "cannot be read"),
    }
    for key, (broken, message) in cases.items():
        (tmp_path / f"{key}.npz").write_bytes(broken)
        assert re.search(message, message_of(ClassificationDataset, str(tmp_path / f"{key}.npz"))), key
    with (tmp_path / "single.npz").open("wb") as stream:
        np.save(stream, RGB)
    assert "single array" in message_of(ClassificationDataset, str(tmp_path / "single.npz"))
    np.savez(tmp_path / "keys.npz", x=RGB, labels=LABELS)
    assert re.search(
        r"has no images, it has \['labels', 'x'\]", message_of(ClassificationDataset, f"{tmp_path}/keys.npz")
    )
    assert "no such file" in message_of(ClassificationDataset, f"{tmp_path}/none.npz")


def test_broken_idx(tmp_path):
    images, labels = idx(tmp_path / "images", GREY, gzip.compress), idx(tmp_path / "labels", LABELS)
    compressed, plain = (tmp_path / "images").read_bytes(), (tmp_path / "labels").read_bytes()

    def message(first=images, second=labels):
        return message_of(ClassificationDataset, f"{first}:{second}")

    assert re.search("begins with 00 00 08 01, expected 00 00 08 03, .* in this order", message(labels, images))
    assert "none: no such file" in message(tmp_path / "none")
    (tmp_path / "cut.gz").write_bytes(compressed[:-100])
    assert re.search(r"cut.gz: cannot be read \(.*end-of-stream", message(tmp_path / "cut.gz"))
    (tmp_path / "bad.gz").write_bytes(compressed[:50] + bytes(60) + compressed[110:])
    assert "bad.gz: cannot be read" in message(tmp_path / "bad.gz")
    for key, content, expected in (
        ("short", plain[:-1], r"holds 29 bytes after its header, which says 30 \(30\)"),
        ("long", plain + b"\0", "holds 31 bytes after its header"),
        ("floats", plain.replace(b"\x08", b"\x0d", 1), "begins with 00 00 0d 01, expected 00 00 08 01"),
        ("head", plain[:6], "begins with 00 00 08 01"),
        ("empty", b"", "begins with nothing"),
    ):
        (tmp_path / key).write_bytes(content)
        assert re.search(f"{key}: {expected}", message(second=tmp_path / key)), key
    idx(tmp_path / "few", LABELS[:4])
    assert re.search(
        r"labels are uint8 of shape \(4,\); expected integers of shape \(30,\)", message(second=tmp_path / "few")
    )


def test_names_that_are_none():
    found = message_of(ClassificationDataset, "patches_test")
    assert re.search(
        r"^data set 'patches_test': no such folder .*nearest are patches_train, patches_val\).*file.npz", found
    )
    assert "no known name" in message_of(ClassificationDataset, "shapes_train")


def test_folders_without_classes_or_images(tmp_path):
    assert "has no subfolders" in message_of(ClassificationDataset, str(tmp_path))
    root = folder(tmp_path / "a")
    for extra in ("aardvark", "zebra"):
        (tmp_path / "a" / extra).mkdir()
    (tmp_path / "a" / "zebra" / "notes.txt").write_text("")
    found = message_of(ClassificationDataset, root)
    assert re.search(r"no images in aardvark \(and 1 more classes\); expected files that end in one of .jpg", found)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(tmp_path, workers):
    root = folder(tmp_path / "a")
    broken = tmp_path / "a" / "bee" / "004.png"
    broken.write_bytes(broken.read_bytes()[:100])
    cfg = config(root, DATALOADER__NUM_WORKERS=workers)
    for loader in (train_loader(cfg, rank=0, world_size=1), make_test_loader(cfg, root, rank=0, world_size=1)):
        assert str(broken) in message_of(take, iter(loader), 40)
        assert not multiprocessing.active_children()


# transforms


def test_test_transforms():
    image = tv_tensors.Image(torch.randint(256, (3, 20, 30), dtype=torch.uint8))
    square = tv_tensors.Image(image[:, :16, :16])
    for crop in ("padded", "none"):
        transform = classifier_test_transforms(config(INPUT__CROP=crop))
        assert transform(image).shape == (3, 16, 16)
        assert torch.equal(transform(square), unit(square))  # of the right size already
    centre = classifier_test_transforms(config(INPUT__CROP="random_resized", INPUT__CROP_SIZE=14))(image)
    expected = v2.functional.center_crop(v2.functional.resize(image, [16]), [14, 14])
    assert torch.equal(centre, unit(expected)) and centre.dtype == torch.float32


def test_train_transforms():
    image = tv_tensors.Image(torch.randint(1, 256, (3, 16, 16), dtype=torch.uint8))

    def draws(**options):
        transform = classifier_train_transforms(config(**options))
        drawn = [transform(image) for _ in range(60)]
        assert all(x.shape == (3, 16, 16) and x.dtype == torch.float32 and 0 <= x.min() <= x.max() <= 1 for x in drawn)
        return drawn

    plain = unit(image)
    assert all(torch.equal(x, plain) for x in draws(INPUT__CROP="none", INPUT__RANDOM_FLIP=0.0))
    flipped = [torch.equal(x, plain.flip(2)) for x in draws(INPUT__CROP="none")]
    assert 15 < sum(flipped) < 45
    black = {int((x == 0).all(0).sum()) for x in draws(INPUT__RANDOM_FLIP=0.0)}
    assert black <= {256 - (16 - i) * (16 - j) for i in range(3) for j in range(3)} and len(black) == 6
    assert len({x.sum().item() for x in draws(INPUT__CROP="random_resized")}) > 50
    assert classifier_train_transforms(config(INPUT__CROP_SIZE=9))(image).shape == (3, 9, 9)


# loaders

MANNERS = {
    "iid": {},
    "few_classes": {"DATALOADER__CLASSES_PER_BATCH": 2},
    "few_classes_in_rounds": {"DATALOADER__CLASSES_PER_BATCH": 3},
    "class_disjoint_halves": {},
}


@pytest.mark.parametrize("manner", MANNERS)
def test_batches(name, manner):
    cfg = config(name, DATALOADER__BATCHES=manner, DATALOADER__CLASSES_WITH_REPLACEMENT=False, **MANNERS[manner])
    seen = set()
    for images, targets in take(train_loader(cfg, rank=0, world_size=1), 10):
        assert len(images) == len(targets) == 6
        assert all(type(x) is torch.Tensor and x.shape == (3, 16, 16) and x.dtype == torch.float32 for x in images)
        labels = [int(target["labels"]) for target in targets]
        assert labels == [target["image_id"] % 3 for target in targets]
        if manner.startswith("few"):
            assert {labels.count(label) for label in labels} == {6 // cfg.DATALOADER.CLASSES_PER_BATCH}
        if manner == "few_classes_in_rounds":
            assert {*labels[:3]} == {*labels[3:]} == {0, 1, 2}
        if manner == "class_disjoint_halves":
            assert not {*labels[:3]} & {*labels[3:]}
        seen |= {target["image_id"] for target in targets}
    assert len(seen) > 20


def test_iid_has_each_image_once_an_epoch_over_the_ranks(name):
    ranks = [take(train_loader(config(name), rank=rank, world_size=2), 10) for rank in range(2)]
    ids = [target["image_id"] for batches in ranks for _, targets in batches for target in targets]
    assert sorted(ids) == sorted([*range(30)] * 2)


@pytest.mark.parametrize("manner", MANNERS)
def test_workers_and_resuming_change_nothing(name, manner):
    def batches(workers, start, count):
        cfg = config(
            name,
            DATALOADER__BATCHES=manner,
            DATALOADER__NUM_WORKERS=workers,
            SOLVER__IMS_PER_BATCH=24,
            SOLVER__ACCUMULATE=2,
            **MANNERS[manner],
        )
        return take(train_loader(cfg, rank=1, world_size=2, start_iteration=start), count)

    alone = batches(0, 0, 6)
    assert_equal(alone, batches(2, 0, 6))
    assert_equal(alone[4:], batches(0, 4, 2))
    assert_equal(alone[4:], batches(2, 4, 2))


def test_normalization_batches_follow_one_another_when_accumulating(name):
    cfg = config(
        name,
        DATALOADER__BATCHES="few_classes",
        DATALOADER__CLASSES_WITH_REPLACEMENT=False,
        DATALOADER__CLASSES_PER_BATCH=2,
        SOLVER__IMS_PER_BATCH=24,
        SOLVER__ACCUMULATE=2,
    )
    kinds = set()
    for _, targets in take(train_loader(cfg, rank=1, world_size=2), 8):
        labels = [int(target["labels"]) for target in targets]
        for part in (labels[:6], labels[6:]):
            assert sorted(map(part.count, {*part})) == [3, 3]
        kinds.add(len({*labels}))
    assert kinds == {2, 3}  # each has classes of its own
    with pytest.raises(UserError, match=r"CLASSES_PER_BATCH 2 contradicts a normalization batch of 3 images"):
        train_loader(cfg, rank=0, world_size=4)


def test_several_data_sets_are_one(name, tmp_path):
    other = npz(tmp_path / "b.npz", RGB[:9], LABELS[:9])
    batches = take(train_loader(config(name, other), rank=0, world_size=1), 20)
    names = [target["file_name"] for _, targets in batches for target in targets]
    assert len({*names[:39]}) == 39 and "b.npz[8]" in names


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 4])
def test_evaluation_covers_every_image_once_and_in_order(name, world_size, workers):
    cfg = config(name, TEST__IMS_PER_BATCH=4, DATALOADER__NUM_WORKERS=workers)
    loaders = [make_test_loader(cfg, name, rank=rank, world_size=world_size) for rank in range(world_size)]
    samples = [(x, t) for loader in loaders for images, targets in loader for x, t in zip(images, targets, strict=True)]
    assert [target["image_id"] for _, target in samples] == [*range(30)]
    assert [i for loader in loaders for batch in loader.batches for i in batch] == [*range(30)]
    assert all(torch.equal(x, unit(torch.from_numpy(RGB[i]).permute(2, 0, 1))) for i, (x, _) in enumerate(samples))
    assert loaders[0].dataset.class_names == ["0", "1", "2"]


def test_number_of_classes(name, tmp_path):
    four = npz(tmp_path / "b.npz", class_names=["a", "b", "c", "d"])
    assert num_classes(config(name)) == 3 and num_classes(config(name, DATASETS__TEST=[four])) == 3
    assert num_classes(config(DATASETS__TEST=[four])) == 4 and num_classes(config("patches_train")) == 4
    assert num_classes(config(folder(tmp_path / "c"))) == 3
    assert num_classes(config(name, MODEL__CLASSIFIER__NUM_CLASSES=7)) == 7
    assert "MODEL.CLASSIFIER.NUM_CLASSES" in message_of(num_classes, config())
    assert "no such file" in message_of(num_classes, config("none.npz"))
    assert "no such folder" in message_of(num_classes, config("none"))


def test_classes_must_be_those_of_training(name, tmp_path):
    other = npz(tmp_path / "b.npz", class_names=["a", "b", "c"])
    ranks = {"rank": 0, "world_size": 1}
    names = r"\['0', '1', '2'\].*\['a', 'b', 'c'\]"
    assert re.search(f"DATASETS.TRAIN: .*{names}", message_of(train_loader, config(name, other), **ranks))
    assert re.search(f"DATASETS.TEST: .*{names}", message_of(make_test_loader, config(other), name, **ranks))
    for gone in ("none.npz", "none", "none:nothing"):  # evaluation does not need the training set
        assert len(make_test_loader(config(gone), name, **ranks)) == 30
    few = config(name, MODEL__CLASSIFIER__NUM_CLASSES=2)
    for make in (lambda: train_loader(few, **ranks), lambda: make_test_loader(few, name, **ranks)):
        assert re.search("MODEL.CLASSIFIER.NUM_CLASSES 2 contradicts .* 3 categories", message_of(make))
    assert "DATASETS.TRAIN is empty; name a data set, such as patches_train" in message_of(
        train_loader, config(), **ranks
    )


# config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"DATALOADER__BATCHES": "few_classes"}, "CLASSES_PER_BATCH 0 contradicts .*'few_classes': say how many"),
        ({"DATALOADER__CLASSES_PER_BATCH": 2}, "CLASSES_PER_BATCH 2 contradicts .*'iid': leave it out"),
        (
            {"DATALOADER__BATCHES": "class_disjoint_halves", "DATALOADER__CLASSES_PER_BATCH": 2},
            "CLASSES_PER_BATCH 2 contradicts .*'class_disjoint_halves'",
        ),
        ({"DATALOADER__BATCHES": "few"}, "DATALOADER.BATCHES takes one of .*nearest: 'few_classes'"),
        ({"DATALOADER__CLASSES_PER_BATCH": -1}, "DATALOADER.CLASSES_PER_BATCH takes a number from 0 on"),
        ({"INPUT__CROP": "centre"}, "INPUT.CROP takes one of"),
        ({"INPUT__CROP_SIZE": 0}, "INPUT.CROP_SIZE takes a number above 0"),
        ({"MODEL__CLASSIFIER__NUM_CLASSES": -1}, "CLASSIFIER.NUM_CLASSES takes a number from 0 on"),
        (
            {"MODEL__META_ARCHITECTURE": "RetinaNet", "DATALOADER__BATCHES": "class_disjoint_halves"},
            "BATCHES 'class_disjoint_halves' contradicts MODEL.META_ARCHITECTURE 'RetinaNet'.*choose Classifier",
        ),
        ({"MODEL__RETINANET__NORM": "BN"}, "RETINANET.NORM 'BN' contradicts .*'Classifier'.*choose RetinaNet$"),
        ({"MODEL__FPN__NORM": "BN"}, "FPN.NORM 'BN' contradicts .*choose RetinaNet or GeneralizedRCNN$"),
        ({"MODEL__MASK_ON": True}, "MASK_ON True contradicts .*'Classifier'"),
    ],
)
def test_keys_that_contradict_each_other(overrides, message):
    assert re.search(message, message_of(config, **overrides))


# --- a validation set that is held out ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_a_share_of_each_class_is_held_out(tmp_path, kind):
    name = npz(tmp_path / "a.npz") if kind == "npz" else folder(tmp_path / "a")
    validation = f"{name}@validation"
    cfg = config(name, DATASETS__VALIDATION=0.2, DATASETS__TEST=[validation], SOLVER__IMS_PER_BATCH=1)
    held = [target for _, targets in make_test_loader(cfg, validation, rank=0, world_size=1) for target in targets]
    whole = ClassificationDataset(name)
    trained = {
        target["file_name"]
        for _, targets in take(train_loader(cfg, rank=0, world_size=1), len(whole) - len(held))
        for target in targets
    }
    assert len(held) == 6 and len(trained) == 24
    assert trained.isdisjoint({target["file_name"] for target in held})
    assert trained | {target["file_name"] for target in held} == {whole[i][1]["file_name"] for i in range(30)}
    counts = torch.bincount(torch.stack([target["labels"] for target in held]))
    assert counts.tolist() == [round(int(c) / 5) for c in torch.bincount(whole.labels)]
    by_name = {whole[i][1]["file_name"]: int(whole.labels[i]) for i in range(30)}
    assert all(by_name[target["file_name"]] == target["labels"] for target in held)


def test_held_out_sets_that_are_none(name):
    with pytest.raises(UserError, match=r"@validation: is what DATASETS\.VALIDATION, a share, .* got VALIDATION 0"):
        make_test_loader(config(name), f"{name}@validation", rank=0, world_size=1)
    cfg = config(name, DATASETS__VALIDATION=0.001)
    with pytest.raises(UserError, match=r"VALIDATION 0\.001 leaves no image"):
        make_test_loader(cfg, f"{name}@validation", rank=0, world_size=1)
    with pytest.raises(UserError, match=r"DATASETS\.VALIDATION .* contradicts MODEL\.META_ARCHITECTURE"):
        load_config(overrides=["DATASETS.VALIDATION", 0.2, "DATASETS.TRAIN", ["shapes_train"]])
