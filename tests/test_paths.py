"""`~` in every path that a user gives; errors are one line, however long or strange what they quote."""

import os
import pickle
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import domainnorm as dn
from domainnorm.config import save_config
from domainnorm.data.catalog import datasets_root, resolve_dataset
from domainnorm.data.classification import resolve_classes
from domainnorm.engine.checkpoint import last_checkpoint, save_checkpoint
from domainnorm.errors import MAX_MESSAGE, MAX_QUOTED, quote
from domainnorm.modeling.checkpoint_file import read_checkpoint
from domainnorm.modeling.pretrained import read_weights
from domainnorm.output import output_folder
from domainnorm.paths import user_path


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield tmp_path
    assert not list((tmp_path / "elsewhere").iterdir())  # no folder of the name ~


def test_the_home_folder(home):
    assert user_path("~") == home and user_path("~/a/~b") == home / "a" / "~b" and user_path(home) == home
    assert user_path("a~b") == Path("a~b") and user_path("") == Path()


@pytest.mark.parametrize("path", ["a\0b", "~\0", "x" * 300, "y/" * 3000, "\ud800", "~nobody-at-all"])
def test_what_can_be_no_path(path):
    with pytest.raises(dn.UserError, match=r"^path ") as error:
        user_path(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 2 * MAX_QUOTED


@pytest.mark.parametrize(
    "take",
    [
        output_folder,
        resolve_classes,
        read_checkpoint,
        read_weights,
        last_checkpoint,
        dn.load_config,
        lambda path: save_config(dn.load_config(), path),
        lambda path: save_checkpoint(path, "model.pth", {}),
        lambda path: resolve_dataset(f"{path}:images"),
        lambda path: resolve_dataset(f"a.json:{path}"),
        lambda path: resolve_classes(f"{path}:labels"),
        lambda path: dn.export_model(nn.Identity(), path),
    ],
)
def test_every_path_is_checked(take):
    for path in ("a\0b", "x" * 300, "~nobody-at-all/x"):
        with pytest.raises(dn.UserError, match=r"path "):
            take(path)


def test_every_path_may_begin_with_the_home_folder(home, monkeypatch):
    assert output_folder("~/run") == home / "run" and (home / "run").is_dir()
    assert resolve_dataset("~/a.json:~/images") == (home / "a.json", home / "images")
    assert resolve_classes("~/folder") == (home / "folder",)
    assert resolve_classes("~/images:~/labels") == (home / "images", home / "labels")
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/sets")
    assert datasets_root() == home / "sets"
    torch.save({"model": {"w": torch.ones(1)}}, home / "w.pth")
    assert read_weights("~/w.pth").state_dict.keys() == {"w"}
    save_checkpoint("~/run", "model_0.pth", {"iteration": 0})
    assert last_checkpoint("~/run") == home / "run" / "model_0.pth"
    assert read_checkpoint("~/run/model_0.pth") == {"iteration": 0}
    save_config(dn.load_config(None, ["SEED", 3]), "~/c.yaml")
    assert dn.load_config("~/c.yaml").SEED == 3


def test_a_training_below_the_home_folder(home):
    tiny.write_dataset(home / "set")
    data_set = "~/set/annotations.json:~/set/images"
    dn.train(tiny.config(data_set, "~/run", SOLVER__MAX_ITER=2, DATASETS__TEST=[data_set]))
    assert {"config.yaml", "model_final.pth", "results.json"} <= set(os.listdir(home / "run"))
    fine_tuned = tiny.config(data_set, "~/tuned", SOLVER__MAX_ITER=1, MODEL__WEIGHTS="~/run/model_final.pth")
    dn.train(fine_tuned)
    dn.train(tiny.config(data_set, "~/run", SOLVER__MAX_ITER=3), resume=True)
    assert (home / "tuned" / "model_final.pth").is_file()


# ---- messages ------------------------------------------------------------------------------------------------------


def test_a_message_is_one_line():
    assert str(dn.UserError("a\nb  c\r\n d\u2028e\tf\x1b[31m\0")) == "a b  c d e\\tf\\x1b[31m\\x00"
    error = pickle.loads(pickle.dumps(dn.UserError("Köln 日本 \ud800")))
    assert type(error) is dn.UserError and str(error) == "Köln 日本 \\ud800"
    long = str(dn.UserError("begin " + "x" * 10**6 + " end"))
    assert len(long) < MAX_MESSAGE + 10 and long.startswith("begin x") and long.endswith("x end")


def test_quoted_values():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    assert [quote(value) for value in ("a'b\n", 3, None, [1, "x"], 1.5, b"x", {"a": True})] == [
        *('"a\'b\\n"', "3", "None", "[1, 'x']", "1.5", "b'x'", "{'a': True}"),
    ]
    assert quote(-(10**5000)) == "a number of about 5000 digits" and "Broken" in quote(Broken())
    assert len(quote("x" * 10**6)) == len(quote([["x"] * 1000] * 1000)) == MAX_QUOTED and quote("x" * 99).endswith("x…")
