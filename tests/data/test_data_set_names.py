"""Data sets with names of their own, "NAME=annotations.json:images": what takes a data set takes one with a name."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

import domainnorm as dn
from domainnorm.data import ClassificationDataset, CocoDataset, by_name, resolve_dataset, split_name
from domainnorm.data.classification_sets import class_names, evaluation_set, shared_images
from domainnorm.data.domains import domain_of
from domainnorm.engine.check import check_test_sets


@pytest.mark.parametrize(
    ("entry", "name", "location"),
    [
        ("pbc=/x/val.json:/x/images", "pbc", "/x/val.json:/x/images"),
        ("two words = a.json:b", "two words", " a.json:b"),
        ("mine=shapes_val", "mine", "shapes_val"),
        ("pets=folder@validation", "pets@validation", "folder@validation"),
        ("a=b=c.json:d", "a", "b=c.json:d"),
        *(
            (same, same, same)
            for same in ("shapes_val", "/x=1/val.json:/x", "~a=b:c", "a.json:x=1/images", "=a:b", "a=")
        ),
    ],
)
def test_a_name_stands_before_the_first_equals_sign(entry, name, location):
    assert split_name(entry) == (name, location)


def test_a_folder_with_an_equals_sign_is_a_path_where_it_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_name("split=val/a.json:split=val/images")[0] == "split"
    Path("split=val").mkdir()
    Path("split=val/a.json").touch()
    entry = "split=val/a.json:split=val/images"
    assert split_name(entry) == (entry, entry)
    assert resolve_dataset(entry) == (Path("split=val/a.json"), Path("split=val/images"))


def test_two_data_sets_of_one_name_are_refused(tmp_path):
    assert by_name(["a=x:y", "b=x:y", "a=x:y"]) == {"a": "a=x:y", "b": "b=x:y"}
    with pytest.raises(dn.UserError, match=r"^DATASETS\.TEST: 'a=x:y' and 'a=x:z' have one name; give them two$"):
        by_name(["a=x:y", "a=x:z"])
    one, other = (tiny.write_dataset(tmp_path / name, count=2) for name in "xy")
    cfg = tiny.config(one, tmp_path, DATASETS__TEST=[f"a={one}", f"a={other}"])
    with pytest.raises(dn.UserError, match="have one name"):
        check_test_sets(cfg)


def test_results_tags_and_folders_have_names(tmp_path, capsys):
    one, other = (tiny.write_dataset(tmp_path / name, count=2) for name in ("one", "other"))
    sets = [f"near={one}", f"far off={other}"]
    cfg = tiny.config(
        f"train={one}", tmp_path / "out", DATASETS__TEST=sets, DATASETS__DOMAINS=["a"], TEST__EVAL_PERIOD=1,
        SOLVER__MAX_ITER=2, SOLVER__IMS_PER_BATCH=2, TEST__RECOMPUTE__DATASET=f"again={other}",
        TEST__STATISTICS=["recomputed"], TEST__RECOMPUTE__NUM_SAMPLES=2,
    )  # fmt: skip
    dn.train(cfg)
    out = tmp_path / "out"
    assert list(json.loads((out / "results.json").read_text())["recomputed"]) == ["near", "far off", "overall"]
    rows = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("recomputed near ") for line in rows) == 2
    assert any(line == "classes far off" for line in rows) and not any(
        str(one) in line for line in rows if "AP" in line
    )
    assert {path.name for path in (out / "inference/recomputed").iterdir()} == {"near", "far_off"}
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert all({"recomputed/near/bbox/AP", "recomputed/far off/bbox/AP-kind 3"} <= set(line) for line in lines[::2])


def test_a_named_data_set_is_the_same_data_set(tmp_path):
    """A name changes neither its domain nor what it shares with others."""
    entry = tiny.write_dataset(tmp_path, count=2)
    assert CocoDataset(f"mine={entry}").image_ids == CocoDataset(entry).image_ids
    cfg = tiny.config(
        f"a={entry}", tmp_path, DATASETS__DOMAINS=["x"], DATASETS__TEST=["t=u:v"], DATASETS__TEST_DOMAINS=["x"]
    )
    assert [domain_of(cfg, name) for name in (entry, f"b={entry}", "u:v", "w=u:v", "u:w")] == [0, 0, 0, 0, -1]


def test_a_classifier_s_data_sets_have_names_too(tmp_path):
    images, labels = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 2
    np.savez(tmp_path / "a.npz", images=images, labels=labels, class_names=["cat", "dog"])
    entry = f"pets={tmp_path / 'a.npz'}"
    assert len(ClassificationDataset(entry)) == 20 and ClassificationDataset("p=patches_val").class_names[0] == "disk"
    assert class_names(entry) == class_names(f"{entry}@validation") == ["cat", "dog"]
    options = ["MODEL.META_ARCHITECTURE", "Classifier", "DATASETS.TRAIN", [entry], "DATASETS.VALIDATION", 0.2]
    cfg = dn.load_config(None, options)
    assert (
        len(evaluation_set(cfg, f"{entry}@validation")) == len(evaluation_set(cfg, f"{tmp_path}/a.npz@validation")) == 4
    )
    assert len(evaluation_set(cfg, entry)) == 16
    assert shared_images(ClassificationDataset(f"other={tmp_path}/a.npz"), entry) == 20
    assert shared_images(evaluation_set(cfg, f"{entry}@validation"), entry) == 0
