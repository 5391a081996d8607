"""Files of a run that are something else, and models of the user's own that do not keep to what is expected."""

import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import domainnorm as dn
from domainnorm.engine.checkpoint import last_checkpoint


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "set", count=4)


@pytest.mark.parametrize("name", ["log.txt", "metrics.json", "config.yaml"])
def test_a_file_of_a_run_that_is_a_folder(data_set, tmp_path, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(dn.UserError, match=f"{name}.*(cannot be|directory)"):
        dn.train(tiny.config(data_set, tmp_path / "out", SOLVER__MAX_ITER=1))


def test_a_pipe_is_no_pointer(tmp_path):
    os.mkfifo(tmp_path / "last_checkpoint")
    with pytest.raises(dn.UserError, match="a named pipe, expected a file"):
        last_checkpoint(tmp_path)


def test_an_output_folder_has_a_name_in_utf_8(data_set, tmp_path):
    with pytest.raises(dn.UserError, match="not UTF-8"):
        dn.train(tiny.config(data_set, f"{tmp_path}/\udcff", SOLVER__MAX_ITER=1))


class Own(nn.Module):
    def __init__(self, losses, detections):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.losses, self.detections = losses, detections

    def forward(self, images, targets=None):
        return self.losses(self.weight.sum()) if self.training else [self.detections] * len(images)


NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}


@pytest.mark.parametrize(
    ("losses", "detections", "message"),
    [
        (lambda x: x, NOTHING, "the Own returned .* in training: expected a dict of losses"),
        (lambda x: {}, NOTHING, "expected a dict of losses"),
        (lambda x: {"loss": x}, {"boxes": torch.zeros(0, 4)}, "in eval mode: expected a list with a dict of boxes"),
    ],
)
def test_what_a_model_of_ones_own_returns(data_set, tmp_path, losses, detections, message):
    cfg = tiny.config(data_set, tmp_path / "out", SOLVER__MAX_ITER=1, DATASETS__TEST=[data_set])
    with pytest.raises(dn.UserError, match=message):
        dn.train(cfg, model=Own(losses, detections))


def test_a_model_of_which_nothing_is_trained(data_set, tmp_path):
    model = Own(lambda x: {"loss": x}, NOTHING).requires_grad_(False)
    with pytest.raises(dn.UserError, match="no parameter of the Own requires a gradient"):
        dn.train(tiny.config(data_set, tmp_path / "out", SOLVER__MAX_ITER=1), model=model)


def test_weights_of_a_model_of_ones_own_are_told(data_set, tmp_path):
    dn.train(tiny.config(data_set, tmp_path / "out", SOLVER__MAX_ITER=1), model=Own(lambda x: {"loss": x}, NOTHING))
    with pytest.raises(dn.UserError, match=r"the weights of the Own that was given to dn\.train"):
        dn.Predictor(tmp_path / "out")


def test_a_report_of_a_test_set_without_objects(data_set, tmp_path):
    file, folder = data_set.rsplit(":", 1)
    content = json.loads(Path(file).read_text())
    (tmp_path / "none.json").write_text(json.dumps(content | {"annotations": []}))
    keys = {"DATASETS__TEST": [f"{tmp_path / 'none.json'}:{folder}"], "TEST__REPORT": True}
    dn.train(tiny.config(data_set, tmp_path / "out", SOLVER__MAX_ITER=1, **keys))
    assert "nothing to find" in (tmp_path / "out" / "report.html").read_text()
