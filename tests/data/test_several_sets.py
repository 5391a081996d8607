"""Several data sets in one training: their domains in the targets, their categories merged, mistakes."""

import itertools
import json
import re

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn

from domainnorm.config import UserError, load_config, save_config
from domainnorm.data import ClassificationDataset, CocoDataset, domain_names, num_classes, one_set_loader, train_loader
from domainnorm.data import test_loader as make_test_loader
from domainnorm.engine import train
from domainnorm.evaluation import evaluate, predict
from domainnorm.evaluation.recompute import recompute
from domainnorm.layers import DomainBatchNorm

ONE = {"rank": 0, "world_size": 1}
CPU = torch.device("cpu")


def write(folder, count, names, first_id=1, used=None):
    """Noise images, one in three wide, image i with one object of each of `used` names; the data set's name."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(first_id)
    categories = [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(names)]
    images, annotations = [], []
    for i in range(count):
        height, width = (24, 40) if i % 3 == 0 else (32, 28)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        images.append({"id": first_id + i, "file_name": f"{i}.png", "height": height, "width": width})
        for category in categories:
            if used is None or category["name"] in used:
                box = [category["id"] // 10, 2, 12, 14]
                annotations.append(
                    {"id": len(annotations), "image_id": first_id + i, "category_id": category["id"], "bbox": box}
                )
    contents = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(contents))
    return f"{folder / 'annotations.json'}:{folder / 'images'}"


@pytest.fixture
def sets(tmp_path):
    """Three sets of other categories: 6, 3 and 6 images with ids from 100, 200 and 300."""
    return [
        write(tmp_path / "a", 6, ["RBC", "WBC"], 100),
        write(tmp_path / "b", 3, ["wbc", "platelet"], 200),
        write(tmp_path / "c", 6, ["RBC", "yeast"], 300),
    ]


UNION = {"DATASETS__LABELS": "union", "DATASETS__RENAME": ["wbc=WBC"]}
DOMAINS = {"DATASETS__DOMAINS": ["x", "y", "x"]}


def config(names, **overrides):
    options = {
        "DATASETS.TRAIN": list(names),
        "SOLVER.IMS_PER_BATCH": 6,
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": [16],
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(overrides=list(itertools.chain.from_iterable(options.items())))


def take(loader, count):
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def targets_of(loader, count):
    return [target for _, targets in take(loader, count) for target in targets]


def message_of(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# domains


def test_targets_say_the_domain_of_their_set(sets):
    cfg = config(sets, **UNION, **DOMAINS)
    assert domain_names(cfg) == ["x", "y"] and domain_names(config(sets)) == []
    seen = set()
    for target in targets_of(train_loader(cfg, **ONE), 10):
        assert target["domain"].dtype == torch.int64 and target["domain"].shape == ()
        assert int(target["domain"]) == (target["image_id"] // 100 == 2)
        seen.add(target["image_id"] // 100)
    assert seen == {1, 2, 3}
    assert targets_of(train_loader(config(sets, **UNION), **ONE), 1)[0]["domain"] == ""  # the file's, as ever


def test_domains_alone_change_no_batch(sets):
    plain, named = (take(train_loader(config(sets, **UNION, **options), **ONE), 8) for options in ({}, DOMAINS))
    for (images, targets), (others, other_targets) in zip(plain, named, strict=True):
        assert all(map(torch.equal, images, others))
        assert [t["image_id"] for t in targets] == [t["image_id"] for t in other_targets]


def test_domains_in_evaluation(sets, tmp_path):
    other, unknown = write(tmp_path / "d", 2, ["RBC", "WBC"]), write(tmp_path / "e", 2, ["WBC"])

    def domain(cfg, name):
        (value,) = {int(target["domain"]) for _, targets in make_test_loader(cfg, name, **ONE) for target in targets}
        return value

    tests = {"DATASETS__TEST": [other, unknown, sets[1]]}
    cfg = config(sets, **UNION, **DOMAINS, **tests, DATASETS__TEST_DOMAINS=["y", "", ""])
    assert [domain(cfg, name) for name in (other, unknown, sets[1], sets[0])] == [1, -1, -1, 0]
    cfg = config(sets, **UNION, **DOMAINS, **tests)
    assert [domain(cfg, name) for name in (other, unknown, sets[1])] == [-1, -1, 1]
    (_, (target,)), *_ = make_test_loader(config(sets, **UNION, **tests), other, **ONE)
    assert target["domain"] == ""


# ratios and composition


@pytest.mark.parametrize("composition", ["mixed", "one_domain_per_rank", "one_domain_per_batch"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_follow_ratios_and_composition(sets, composition, accumulate):
    cfg = config(
        sets,
        **UNION,
        **DOMAINS,
        DATALOADER__RATIOS=[1, 2, 1],
        DATALOADER__COMPOSITION=composition,
        SOLVER__IMS_PER_BATCH=8,
        SOLVER__ACCUMULATE=accumulate,
    )
    share = 8 // (2 * accumulate)
    ranks = [take(train_loader(cfg, rank=rank, world_size=2), 12) for rank in (0, 1)]
    counts = {1: 0, 2: 0, 3: 0}
    for step in zip(*ranks, strict=True):
        of_step = [target for _, targets in step for target in targets]
        for target in of_step:
            counts[target["image_id"] // 100] += 1
        for images, targets in step:
            for part in (slice(k, k + share) for k in range(0, 4, share)):
                assert len({image.shape[2] > image.shape[1] for image in images[part]}) == 1
                domains = {int(target["domain"]) for target in targets[part]}
                assert composition == "mixed" or len(domains) == 1
        if composition == "one_domain_per_batch":
            assert len({int(target["domain"]) for target in of_step}) == 1
    assert abs(counts[2] - 48) <= 8 and abs(counts[1] - 24) <= 8
    resumed = take(train_loader(cfg, rank=1, world_size=2, start_iteration=7), 5)
    for (images, targets), (others, other_targets) in zip(ranks[1][7:], resumed, strict=True):
        assert all(map(torch.equal, images, others))
        assert [t["image_id"] for t in targets] == [t["image_id"] for t in other_targets]


def test_composition_without_ratios_takes_numbers_of_images(sets):
    cfg = config(sets, **UNION, **DOMAINS, DATALOADER__COMPOSITION="one_domain_per_batch", SOLVER__IMS_PER_BATCH=3)
    ids = [target["image_id"] for target in targets_of(train_loader(cfg, **ONE), 25)]
    assert abs(sum(i // 100 == 2 for i in ids) - 15) <= 3


def test_orientations_are_not_grouped_if_not_asked(sets):
    cfg = config(sets, **UNION, DATALOADER__RATIOS=[1, 1, 1], DATALOADER__ASPECT_RATIO_GROUPING=False)
    batches = take(train_loader(cfg, **ONE), 5)
    assert any(len({image.shape[2] > image.shape[1] for image in images}) == 2 for images, _ in batches)


def test_recomputing_on_one_set(sets, tmp_path):
    """Without ratios and composition, which are of the training sets; with the domain of this one."""
    other = write(tmp_path / "d", 4, ["WBC"], 400)
    cfg = config(
        sets,
        **UNION,
        **DOMAINS,
        DATALOADER__RATIOS=[1, 2, 1],
        DATALOADER__COMPOSITION="one_domain_per_batch",
        DATASETS__TEST=[other],
        DATASETS__TEST_DOMAINS=["y"],
        MODEL__DEVICE="cpu",
        TEST__RECOMPUTE__NUM_SAMPLES=12,
    )
    for name, hundreds, domain in ((other, 4, 1), (sets[1], 2, 1), (sets[2], 3, 0)):
        targets = targets_of(one_set_loader(cfg, name, **ONE), 3)
        assert {(target["image_id"] // 100, int(target["domain"])) for target in targets} == {(hundreds, domain)}
    assert targets[0]["labels"].tolist() == [0, 3]  # of the model
    unknown = write(tmp_path / "e", 4, ["yeast"])
    assert {int(target["domain"]) for target in targets_of(one_set_loader(cfg, unknown, **ONE), 2)} == {-1}
    save_config(cfg, tmp_path / "config.yaml")
    for name in ("", other):
        model = Domains()
        recompute(load_config(tmp_path / "config.yaml", ["TEST.RECOMPUTE.DATASET", name]), model)
        assert model.seen == ({0, 1} if name == "" else {1})
    bad = write(tmp_path / "f", 4, ["fungus"])
    assert "TEST.RECOMPUTE.DATASET: " in message_of(one_set_loader, cfg, bad, **ONE)


class Domains(nn.Module):
    """Notes the domains that it is given."""

    def __init__(self):
        super().__init__()
        self.norm = DomainBatchNorm(3)
        self.seen = set()

    def forward(self, images, targets):
        self.seen |= {int(target["domain"]) for target in targets}
        return self.norm(torch.stack([image.mean((1, 2)) for image in images]))


# categories


def test_categories_are_merged_by_name(sets):
    cfg = config(sets, **UNION)
    assert num_classes(cfg) == 4  # RBC, WBC, platelet, yeast
    assert num_classes(config(sets, DATASETS__LABELS="union")) == 5  # wbc is another
    labels = {1: [0, 1], 2: [1, 2], 3: [0, 3]}
    for target in targets_of(train_loader(cfg, **ONE), 10):
        assert target["labels"].tolist() == labels[target["image_id"] // 100]
        assert target["boxes"].shape == (2, 4)
    with pytest.raises(UserError, match=r"NUM_CLASSES 3 contradicts .* 4 categories"):
        train_loader(config(sets, **UNION, MODEL__RETINANET__NUM_CLASSES=3), **ONE)
    assert num_classes(config(sets, **UNION, MODEL__RETINANET__NUM_CLASSES=7)) == 7


def test_equal_labels_of_renamed_categories(tmp_path):
    """Also several categories made one."""
    names = [write(tmp_path / "a", 4, ["RBC", "WBC"]), write(tmp_path / "b", 4, ["rbc", "lymph", "mono"], 100)]
    cfg = config(names, DATASETS__RENAME=["rbc = RBC", "lymph=WBC", "mono=WBC"])
    assert num_classes(cfg) == 2
    for target in targets_of(train_loader(cfg, **ONE), 6):
        assert target["labels"].tolist() == ([0, 1] if target["image_id"] < 100 else [0, 1, 1])
    assert "['RBC', 'WBC'], " in message_of(train_loader, config(names), **ONE)


def test_case_is_a_difference_that_is_warned_of(sets, caplog):
    train_loader(config(sets, DATASETS__LABELS="union"), **ONE)
    assert "'WBC' and 'wbc' are two classes: DATASETS.RENAME" in caplog.text
    caplog.clear()
    train_loader(config(sets, **UNION), **ONE)
    assert not caplog.text


class Oracle(nn.Module):
    """Finds each object of a set, of the known label, and one of every class that the set does not have."""

    def __init__(self, dataset, classes):
        super().__init__()
        self.records = iter(dataset.records)
        self.absent = [k for k in range(classes) if dataset.category_ids[k] is None]

    def forward(self, images):
        outputs = []
        for _ in images:
            record, count = next(self.records), len(self.absent)
            outputs.append(
                {
                    "boxes": torch.cat([torch.ones(count, 4).cumsum(1), torch.from_numpy(record.boxes)]),
                    "labels": torch.cat(
                        [torch.tensor(self.absent, dtype=torch.int64), torch.from_numpy(record.labels)]
                    ),
                    "scores": torch.cat([torch.ones(count), torch.full((len(record.labels),), 0.9)]),
                    "masks": torch.ones(count + len(record.labels), 1, *images[0].shape[1:]),
                }
            )
        return outputs


@pytest.mark.parametrize(
    ("names", "ids", "found"),
    [
        (["yeast", "RBC"], [20, None, None, 10], [10, 20]),
        (["platelet"], [None, None, 10, None], [10]),
        (["WBC", "platelet", "RBC", "yeast"], [30, 10, 20, 40], [10, 20, 30, 40]),
        (["wbc", "WBC", "RBC"], [30, 10, None, None], [10, 10, 30]),  # two that are one
    ],
)
def test_a_test_set_may_have_some_of_the_classes(sets, tmp_path, names, ids, found):
    name = write(tmp_path / "d", 3, names)
    cfg = config(sets, **UNION, DATASETS__TEST=[name], OUTPUT_DIR=str(tmp_path / "out"), MODEL__DEVICE="cpu")
    loader = make_test_loader(cfg, name, **ONE)
    assert loader.dataset.category_ids == ids and loader.dataset.class_names == ["RBC", "WBC", "platelet", "yeast"]
    results = predict(Oracle(loader.dataset, 4), loader, CPU)
    for image_id in (1, 2, 3):
        of_image = [result for result in results if result["image_id"] == image_id]
        assert sorted(result["category_id"] for result in of_image) == found
        assert all(result["score"] < 1 and "counts" in result["segmentation"] for result in of_image)
    scores = evaluate(cfg, Oracle(loader.dataset, 4))
    assert scores["population"]["bbox"]["AP"] == pytest.approx(100)


def test_no_prediction_of_a_class_that_the_set_has(sets, tmp_path):
    name = write(tmp_path / "d", 2, ["platelet"])
    loader = make_test_loader(config(sets, **UNION), name, **ONE)
    model = Oracle(loader.dataset, 4)
    model.records = iter([type("Record", (), {"boxes": np.zeros((0, 4), "f4"), "labels": np.zeros(0, "i8")})] * 2)
    assert predict(model, loader, CPU) == []


def test_a_detector_of_the_union_trains_and_is_evaluated(tmp_path):
    """End to end: a subset of its classes, with images of other sets, on one process."""
    names = [tiny.write_dataset(tmp_path / "a"), write(tmp_path / "b", 4, ["kind 7", "other"])]
    cfg = tiny.config(
        "",
        tmp_path / "out",
        DATASETS__TRAIN=names,
        DATASETS__TEST=names,
        DATASETS__DOMAINS=["a", "b"],
        DATASETS__TEST_DOMAINS=["a", "b"],
        DATASETS__LABELS="union",
        DATALOADER__RATIOS=[1, 1],
        DATALOADER__COMPOSITION="one_domain_per_batch",
    )
    assert train(cfg).head.classification_head.num_classes == 3
    ids = [
        {
            result["category_id"]
            for result in json.loads(next((tmp_path / "out/inference/population").glob(f"*_{s}_ann*/*")).read_text())
        }
        for s in ("a", "b")
    ]
    assert ids[0] <= {3, 7} and ids[1] <= {10, 20} and all(ids)


def test_classes_that_the_model_has_not(sets, tmp_path):
    other = write(tmp_path / "d", 2, ["RBC", "fungus"])
    message = message_of(make_test_loader, config(sets, **UNION), other, **ONE)
    assert re.search(r"^DATASETS.TEST: .*\['fungus'\].*\['RBC', 'WBC', 'platelet', 'yeast'\].*DATASETS.RENAME", message)
    renamed = config(sets, DATASETS__LABELS="union", DATASETS__RENAME=["wbc=WBC", "fungus=yeast"])
    assert make_test_loader(renamed, other, **ONE).dataset.category_ids == [10, None, None, 20]
    # Of the union every training set is needed, of equal categories none.
    gone = message_of(make_test_loader, config([*sets, "none.json:none"], **UNION), sets[0], **ONE)
    assert "none.json: no such file" in gone
    assert len(make_test_loader(config(["none.json:none"]), sets[0], **ONE)) == 6
    assert make_test_loader(config([], DATASETS__RENAME=["RBC=WBC"]), sets[0], **ONE).dataset.category_ids == [10]


def test_new_names_for_no_category(sets, tmp_path):
    cfg = config(sets, DATASETS__LABELS="union", DATASETS__RENAME=["wbcs=WBC"])
    assert "DATASETS.RENAME 'wbcs': no data set has such a category; nearest: 'wbc'" in message_of(
        train_loader, cfg, **ONE
    )
    other = write(tmp_path / "d", 2, ["wbcs"])
    tested = config(sets, DATASETS__LABELS="union", DATASETS__RENAME=["wbcs=WBC"], DATASETS__TEST=[other])
    assert len(take(train_loader(tested, **ONE), 1)) == 1


def test_sets_that_are_not_equal_say_what_to_do(sets):
    message = message_of(train_loader, config(sets), **ONE)
    assert "must be equal" in message and "DATASETS.LABELS union" in message and "DATASETS.RENAME" in message
    message = message_of(make_test_loader, config(sets[:1]), sets[1], **ONE)
    assert "must be equal" in message and "DATASETS.LABELS union" in message


# classifiers


def archive(file, count, names):
    rng = np.random.default_rng(count)
    labels = np.arange(count) % len(names)
    np.savez(file, images=rng.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8), labels=labels, class_names=names)
    return str(file)


CLASSIFIER = {"MODEL__META_ARCHITECTURE": "Classifier", "MODEL__BACKBONE__NAME": "cifar_resnet8", "INPUT__CROP_SIZE": 8}


def test_classifiers_too(tmp_path):
    names = [archive(tmp_path / "a.npz", 12, ["ant", "bee"]), archive(tmp_path / "b.npz", 9, ["Bee", "cat", "dog"])]
    options = CLASSIFIER | {
        "DATASETS__LABELS": "union",
        "DATASETS__RENAME": ["Bee=bee"],
        "DATASETS__DOMAINS": ["x", "y"],
    }
    cfg = config(names, **options, DATALOADER__RATIOS=[1, 3], DATALOADER__COMPOSITION="one_domain_per_batch")
    assert num_classes(cfg) == 4
    labels, domains = {0: set(), 1: set()}, []
    for _, targets in take(train_loader(cfg, **ONE), 16):
        (domain,) = {int(target["domain"]) for target in targets}
        assert {target["file_name"][0] for target in targets} == {"ab"[domain]}
        labels[domain] |= {int(target["labels"]) for target in targets}
        domains.append(domain)
    assert labels == {0: {0, 1}, 1: {1, 2, 3}} and sum(domains) == 12
    test = archive(tmp_path / "c.npz", 4, ["dog", "ant"])
    (_, targets), *_ = make_test_loader(cfg, test, **ONE)
    assert [int(t["labels"]) for _, ts in make_test_loader(cfg, test, **ONE) for t in ts] == [3, 0, 3, 0]
    assert int(targets[0]["domain"]) == -1
    plain = ClassificationDataset(test)
    assert plain.labels.tolist() == [0, 1, 0, 1] and plain.class_names == ["dog", "ant"]


# mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"DATASETS__DOMAINS": ["x"]}, r"^DATASETS.DOMAINS \['x'\] contradicts DATASETS.TRAIN .* these 2, or \[\]"),
        ({"DATASETS__DOMAINS": ["x", ""]}, r"^DATASETS.DOMAINS takes names of one line, got ''"),
        ({"DATASETS__DOMAINS": ["x", "a\nb"]}, r"^DATASETS.DOMAINS takes names of one line, got 'a\\nb'"),
        ({"DATASETS__TEST_DOMAINS": ["x"]}, r"^DATASETS.TEST_DOMAINS \['x'\] contradicts DATASETS.DOMAINS \[\]"),
        (
            {"DATASETS__DOMAINS": ["x", "y"], "DATASETS__TEST_DOMAINS": ["x", "y"]},
            r"^DATASETS.TEST_DOMAINS \['x', 'y'\] contradicts DATASETS.TEST \['t:t'\]: .* these 1",
        ),
        (
            {"DATASETS__DOMAINS": ["day", "night"], "DATASETS__TEST_DOMAINS": ["nigth"]},
            r"^DATASETS.TEST_DOMAINS takes any of .* got 'nigth'; nearest: 'night'",
        ),
        ({"DATASETS__LABELS": "unoin"}, r"^DATASETS.LABELS takes one of .*nearest: 'union'"),
        ({"DATASETS__RENAME": ["old="]}, r"^DATASETS.RENAME takes entries such as 'old=new', got 'old='"),
        ({"DATASETS__RENAME": ["=new"]}, r"^DATASETS.RENAME takes entries"),
        ({"DATASETS__RENAME": ["a=b=c"]}, r"^DATASETS.RENAME takes entries"),
        ({"DATASETS__RENAME": ["old"]}, r"^DATASETS.RENAME takes entries"),
        ({"DATASETS__RENAME": ["a=b", "a=c"]}, r"^DATASETS.RENAME has several new names for 'a'"),
        ({"DATALOADER__RATIOS": [1]}, r"^DATALOADER.RATIOS \[1.0\] contradicts DATASETS.TRAIN .* these 2"),
        ({"DATALOADER__RATIOS": [1, 0]}, r"^DATALOADER.RATIOS takes a number above 0, got \[1.0, 0.0\]"),
        ({"DATALOADER__RATIOS": [1, float("nan")]}, r"^DATALOADER.RATIOS takes a number above 0"),
        ({"DATALOADER__RATIOS": ["a", 1]}, r"DATALOADER.RATIOS takes a list such as \[0.0\]"),
        (
            {"DATALOADER__COMPOSITION": "one_domain"},
            r"^DATALOADER.COMPOSITION takes one of .* nearest: 'one_domain_per",
        ),
        (
            {"DATALOADER__COMPOSITION": "one_domain_per_rank"},
            r"^DATALOADER.COMPOSITION 'one_domain_per_rank' contradicts DATASETS.DOMAINS \[\]",
        ),
        (
            CLASSIFIER | {"DATALOADER__RATIOS": [1, 2], "DATALOADER__BATCHES": "class_disjoint_halves"},
            r"^DATALOADER.RATIOS \[1.0, 2.0\] contradicts DATALOADER.BATCHES 'class_disjoint_halves'",
        ),
        (
            CLASSIFIER
            | {
                "DATASETS__DOMAINS": ["x", "y"],
                "DATALOADER__COMPOSITION": "one_domain_per_batch",
                "DATALOADER__BATCHES": "class_disjoint_halves",
            },
            r"^DATALOADER.COMPOSITION 'one_domain_per_batch' contradicts DATALOADER.BATCHES",
        ),
    ],
)
def test_contradictions(overrides, message):
    tests = {} if overrides.get("DATASETS__TEST_DOMAINS") is None else {"DATASETS__TEST": ["t:t"]}
    assert re.search(message, message_of(config, ["a:a", "b:b"], **tests, **overrides))


def test_a_saved_config_keeps_them(sets, tmp_path):
    cfg = config(sets, **UNION, **DOMAINS, DATALOADER__RATIOS=[1, 2.5, 1])
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg
    assert load_config(tmp_path / "config.yaml", ["DATALOADER.RATIOS", "[1, 1, 2]"]).DATALOADER.RATIOS == [1, 1, 2]


def test_a_data_set_is_as_its_file_says_until_it_is_relabelled(sets):
    dataset = CocoDataset(sets[1])
    truth = dataset.ground_truth()
    assert dataset.category_ids == [10, 20] and dataset.records[0].labels.tolist() == [0, 1]
    assert truth == json.loads(dataset.annotation_file.read_text())
