"""CIFAR and SVHN as their authors distribute them, in small."""

import os
import pickle
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset

import domainnorm as dn
from domainnorm.data.archives import read_archive
from domainnorm.data.classification import ClassificationDataset

IMAGES = 100  # in a batch of CIFAR-10


def pixels(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def labels_of(count, classes):
    return [k % classes for k in range(count)]


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=2))


def cifar10(root, kind):
    names = [f"class{k}" for k in range(10)]
    folder = root / "cifar10" / ("cifar-10-batches-py" if kind == "python" else "cifar-10-batches-bin")
    batches = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    for seed, batch in enumerate(batches):
        images, labels = pixels(IMAGES, seed), labels_of(IMAGES, 10)
        if kind == "python":
            write(folder / batch, {b"data": images, b"labels": labels, b"filenames": [b"a.png"] * IMAGES})
        else:
            write(folder / f"{batch}.bin", np.column_stack([np.uint8(labels), images]).tobytes())
    if kind == "python":
        write(folder / "batches.meta", {b"label_names": [name.encode() for name in names]})
    else:
        write(folder / "batches.meta.txt", "\n".join(names).encode() + b"\n\n")


def cifar100(root, kind):
    folder = root / "cifar100" / ("cifar-100-python" if kind == "python" else "cifar-100-binary")
    names = [f"fine{k:02}" for k in range(100)]
    for seed, (part, count) in enumerate((("train", 1000), ("test", 200))):
        images, labels = pixels(count, seed), labels_of(count, 100)
        coarse = [label // 5 for label in labels]
        if kind == "python":
            write(folder / part, {b"data": images, b"fine_labels": labels, b"coarse_labels": coarse})
        else:
            write(folder / f"{part}.bin", np.column_stack([np.uint8(coarse), np.uint8(labels), images]).tobytes())
    if kind == "python":
        write(folder / "meta", {b"fine_label_names": [name.encode() for name in names]})
    else:
        write(folder / "fine_label_names.txt", "\n".join(names).encode())


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar10(root, kind):
    cifar10(root, kind)
    test = ClassificationDataset("cifar10_test")
    assert len(test) == IMAGES and test.class_names == [f"class{k}" for k in range(10)]
    image, target = test[13]
    assert image.shape == (3, 32, 32) and int(target["labels"]) == 3
    assert np.array_equal(image.numpy().reshape(-1), pixels(IMAGES, 5)[13])
    whole, train, val = (read_archive(f"cifar10_{split}") for split in ("trainval", "train", "val"))
    assert (len(whole.labels), len(train.labels), len(val.labels)) == (500, 450, 50)
    assert (np.bincount(val.labels) == 5).all() and (np.bincount(train.labels) == 45).all()
    both = {image.tobytes() for part in (train, val) for image in part.images}
    assert both == {image.tobytes() for image in whole.images}
    assert np.array_equal(read_archive("cifar10_val").images, val.images)


def test_both_versions_of_cifar_have_the_same_split(root, tmp_path, monkeypatch):
    cifar10(root, "python")
    first = read_archive("cifar10_train")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "other"))
    cifar10(tmp_path / "other", "binary")
    assert np.array_equal(read_archive("cifar10_train").images, first.images)


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar100_has_its_fine_labels(root, kind):
    cifar100(root, kind)
    test, val = read_archive("cifar100_test"), read_archive("cifar100_val")
    assert test.labels.tolist() == labels_of(200, 100) and test.class_names[7] == "fine07"
    assert len(val.labels) == 100 and (np.bincount(val.labels) == 1).all()
    assert np.array_equal(test.images[5].transpose(2, 0, 1).reshape(-1), pixels(200, 1)[5])


def test_svhn(root):
    savemat = pytest.importorskip("scipy.io").savemat
    images = pixels(20, 0).reshape(20, 32, 32, 3)
    (root / "svhn").mkdir()
    savemat(root / "svhn/train_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": np.arange(20)[:, None] % 10 + 1})
    found = ClassificationDataset("svhn_train")
    assert found.labels[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]  # 10 stands for the digit 0
    assert np.array_equal(found[3][0].numpy(), images[3].transpose(2, 0, 1))
    savemat(root / "svhn/extra_32x32.mat", {"X": images.transpose(1, 2, 3, 0)[..., :3], "y": [[2], [10], [4]]})
    both = ClassificationDataset("svhn_trainval")
    assert both.labels[18:].tolist() == [9, 0, 2, 0, 4] and torch.equal(both[21][0], both[1][0])
    (root / "svhn/test_32x32.mat").write_bytes(b"nothing")
    with pytest.raises(dn.UserError, match=r"test_32x32.mat: is not as .*download it again"):
        read_archive("svhn_test")


def test_without_scipy_it_says_so(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(dn.UserError, match="pip install scipy"):
        read_archive("svhn_train")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"broken", "is not a batch of CIFAR's python version"),
        (["a list"], "but a list"),
        ({b"data": np.zeros((3, 10), np.uint8), b"labels": [0] * 3}, "expected uint8 data of 3072 bytes"),
        (
            {b"data": np.zeros((3, 3072), np.uint8), b"labels": [0]},
            "expected a list of 3 whole numbers as labels, got 1 of them",
        ),
        (
            {b"data": np.zeros((3, 3072), np.uint8), b"labels": [0, 1, 99]},
            "labels from 0 to 99 in test_batch, expected labels from 0 to 9",
        ),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [[1], [1, 2]]}, "expected a list of 2 whole numbers"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": None}, "as labels, got NoneType"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [2**63 + 1]}, "labels from 255 to 255 in test_batch"),
        (Malicious(), "it asks for (posix|nt|os).system"),
    ],
)
def test_broken_batches_are_one_line(root, content, message):
    cifar10(root, "python")
    write(root / "cifar10/cifar-10-batches-py/test_batch", content)
    with pytest.raises(dn.UserError, match=message) as error:
        read_archive("cifar10_test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "names", [{}, {b"label_names": 3}, {b"label_names": ["a"] * 10}, {b"label_names": [b"a"] * 10}]
)
def test_broken_names_are_one_line(root, names):
    cifar10(root, "python")
    write(root / "cifar10/cifar-10-batches-py/batches.meta", names)
    with pytest.raises(dn.UserError, match=r"batches.meta: names \d classes, expected 10"):
        read_archive("cifar10_test")


def test_labels_of_svhn_are_from_1_to_10(root):
    savemat = pytest.importorskip("scipy.io").savemat
    (root / "svhn").mkdir()
    savemat(root / "svhn/test_32x32.mat", {"X": np.zeros((32, 32, 3, 3), np.uint8), "y": np.array([[1], [0], [10]])})
    with pytest.raises(dn.UserError, match="expected labels from 1 to 10"):
        read_archive("svhn_test")


def test_what_is_missing_is_said(root):
    with pytest.raises(
        dn.UserError, match=r"cifar10: has neither cifar-10-batches-py nor .*unpack .*DETECTRON2_DATASETS"
    ):
        ClassificationDataset("cifar10_train")
    with pytest.raises(dn.UserError, match=r"train_32x32.mat: no such file"):
        pytest.importorskip("scipy")
        read_archive("svhn_train")
    with pytest.raises(dn.UserError, match=r"no known name \(the nearest are cifar10_test, "):
        ClassificationDataset("cifar10_tset")
    cifar10(root, "binary")
    (root / "cifar10/cifar-10-batches-bin/test_batch.bin").write_bytes(b"x" * 100)
    with pytest.raises(dn.UserError, match="has 100 bytes, expected 3073 an image"):
        read_archive("cifar10_test")


def test_a_classifier_trains_on_it(root, tmp_path):
    cifar10(root, "python")
    words = ["MODEL.META_ARCHITECTURE", "Classifier", "MODEL.BACKBONE.NAME", "cifar_resnet8", "INPUT.CROP_SIZE", 32]
    words += ["DATASETS.TRAIN", ["cifar10_train"], "DATASETS.TEST", ["cifar10_val"], "INPUT.CROP", "padded"]
    words += ["SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 0, "MODEL.BACKBONE.NORM", "BN", "MODEL.DEVICE", "cpu"]
    cfg = dn.load_config(None, [*words, "OUTPUT_DIR", str(tmp_path / "out"), "DATALOADER.NUM_WORKERS", 0])
    model = dn.train(cfg)
    assert model.body.fc.out_features == 10
    assert "top1" in dn.evaluate(cfg, model)["population"]["classification"]
    assert isinstance(ConcatDataset([ClassificationDataset("cifar10_train")]), ConcatDataset)
