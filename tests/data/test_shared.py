"""What processes of one run share instead of reading it again."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import domainnorm.data.columns as columns_module
from domainnorm.config import UserError
from domainnorm.data import CocoDataset
from domainnorm.data.columns import read_columns
from domainnorm.data.shared import shared
from domainnorm.distributed import SHARED_FOLDER, launch

READ = """
import sys, domainnorm.data.columns as c
c._KEPT_FROM = 0
read, c._read = c._read, lambda *args: (print("read"), read(*args))[1]
from domainnorm.data import CocoDataset
data = CocoDataset(sys.argv[1], masks=True)
print(len(data), data[1][1]["masks"].sum().item())
print(data.records.columns.xywh.flags.writeable, data.records.columns.segmentations.coordinates.flags.writeable)
"""


@pytest.fixture
def name(tmp_path):
    """A data set of two images, an object each."""
    boxes = [[1, 1, 8, 8], [2, 3, 4, 5]]
    data = {
        "images": [{"id": k, "file_name": f"{k}.png", "height": 16, "width": 16} for k in (0, 1)],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [
            {"id": k, "image_id": k, "category_id": 1, "bbox": [x, y, w, h]}
            | {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
            for k, (x, y, w, h) in enumerate(boxes)
        ],
    }
    for k in (0, 1):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{k}.png")
    (tmp_path / "a.json").write_text(json.dumps(data))
    return f"{tmp_path / 'a.json'}:{tmp_path}"


def test_the_first_process_reads_and_the_others_map(name, tmp_path):
    environment = os.environ | {SHARED_FOLDER: str(tmp_path)}
    outputs = [
        subprocess.run([sys.executable, "-c", READ, name], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    expected = ["2 20", "False False"]
    assert [done.stdout.splitlines() for done in outputs] == [["read", *expected], expected]


def test_another_content_is_read_anew(name, tmp_path, monkeypatch):
    monkeypatch.setenv(SHARED_FOLDER, str(tmp_path))
    monkeypatch.setattr(columns_module, "_KEPT_FROM", 0)
    file = tmp_path / "a.json"
    before = read_columns(file, masks=True)
    assert read_columns(file, masks=True) is before and read_columns(file) is before
    file.write_text(file.read_text().replace('"x"', '"other"'))
    assert [entry["name"] for entry in read_columns(file).categories] == ["other"]
    assert CocoDataset(name, masks=True)[0][1]["masks"].sum() == 64


def test_what_is_shared_is_what_was_made(tmp_path, monkeypatch):
    made = {"a": np.arange(10), "b": [np.zeros((0, 4)), "text"], "c": np.array([[True], [False]])}
    assert shared("key", lambda: made) is made  # nobody to share it with
    monkeypatch.setenv(SHARED_FOLDER, str(tmp_path))
    with pytest.raises(UserError, match="broken"):
        shared("key", _raise)
    for make in (lambda: made, _raise):
        found = shared("key", make)
        assert found["b"][1] == "text" and found["a"].dtype == np.int64
        for one, other in ((found["a"], made["a"]), (found["b"][0], made["b"][0]), (found["c"], made["c"])):
            np.testing.assert_array_equal(one, other)
    assert shared("another", lambda: 3) == 3


def _raise():
    raise UserError("broken")


def _tell(file):
    with open(file, "a") as stream:
        stream.write(os.environ[SHARED_FOLDER] + "\n")


def test_ranks_of_a_command_share_a_folder_that_ends_with_it(tmp_path):
    launch(_tell, (tmp_path / "told",), num_processes=2)
    one, other = (tmp_path / "told").read_text().splitlines()
    assert one == other and not os.path.exists(one) and SHARED_FOLDER not in os.environ
