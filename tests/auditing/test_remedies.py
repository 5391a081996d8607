"""What a finding tells to do can be done: config keys and names that exist."""

import re
from pathlib import Path

import pytest

import domainnorm as dn
from domainnorm.auditing.finding import counted, norm_key

ROOT = Path(__file__).parents[2]
FILES = [*sorted((ROOT / "domainnorm" / "auditing" / "checks").glob("*.py")), ROOT / "docs" / "audit.md"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_keys_and_names_exist(file):
    text = file.read_text(encoding="utf-8")
    for key in re.findall(r"\b(?:MODEL|SOLVER|TEST|DATASETS|DATALOADER|INPUT)(?:\.[A-Z_0-9]+)+", text):
        node = dn.load_config(None)
        for part in key.split("."):
            assert part in node, key
            node = node[part]
    for name in re.findall(r"\bdn\.(\w+)", text):
        assert name in dn.__all__, name


def test_the_key_of_a_layer():
    """Of the norms that it is one of, in the models of a config."""
    keys = {"MODEL.BACKBONE.NORM", "MODEL.RETINANET.NORM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM"}
    parts = ["backbone.body.bn1", "head.classification_head.conv.0.1"]
    parts += ["roi_heads.box_head.0.1", "roi_heads.mask_head.0.1"]
    assert {norm_key(layer) for layer in parts} == keys and norm_key("body.bn1") == "MODEL.BACKBONE.NORM"


def test_numbers_and_words():
    assert [counted(1, "batch"), counted(2, "batch"), counted(1, "layer")] == ["1 batch", "2 batches", "1 layer"]
