"""Checkpoints: whole or not at all; resumed to the bit or refused."""

import os
import random
import re
import signal
import sys

import numpy as np
import pytest
import tiny
import torch
from ranks import run_ranks
from torch import nn

from domainnorm.config import UserError
from domainnorm.engine import train
from domainnorm.engine.checkpoint import last_checkpoint, save_checkpoint
from domainnorm.layers import DomainBatchNorm
from domainnorm.modeling.checkpoint_file import read_checkpoint
from domainnorm.modeling.weights import load_weights

train_module = sys.modules["domainnorm.engine.train"]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "set")


class Stopped(Exception):
    pass


def interrupt(module, after):
    """The power goes `after` so many batches."""
    original = module.train_loader

    def loader(*args, **kwargs):
        for number, batch in enumerate(original(*args, **kwargs)):
            if number == after:
                raise Stopped
            yield batch

    module.train_loader = loader
    return original


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def train_in_two(cfg, build=None):
    if build:
        train_module.build_model = build
    original = interrupt(train_module, after=3)  # one step after the checkpoint of iteration 2: it is done again
    try:
        with pytest.raises(Stopped):
            train(cfg)
    finally:
        train_module.train_loader = original
    assert last_checkpoint(cfg.OUTPUT_DIR).name == "model_0000002.pth"
    return train(cfg, resume=True)


def assert_same_run(one, other):
    a, b = (read_checkpoint(folder / "model_final.pth") for folder in (one, other))
    assert a.pop("config") != b.pop("config")  # OUTPUT_DIR
    assert_same(a, b)


# --- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_resumed_detector_equals_one_that_never_stopped(data_set, tmp_path, optimizer):
    """Also where one of them was evaluated on the way, with each kind of statistics."""
    choices = {"SOLVER__OPTIMIZER": optimizer, "SOLVER__BASE_LR": 0.001}
    train(tiny.config(data_set, tmp_path / "a", **choices))
    choices |= {"DATASETS__TEST": [data_set], "TEST__EVAL_PERIOD": 2, "TEST__STATISTICS": ["minibatch", "population"]}
    evaluated = tiny.config(data_set, tmp_path / "b", **choices)
    train_in_two(evaluated)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def _noisy(cfg):
    return tiny.Regressor(norm=True, dropout=0.5)


def test_random_states_are_resumed(data_set, tmp_path, monkeypatch):
    class Draws(tiny.Regressor):
        def forward(self, images, targets=None):
            losses = super().forward(images, targets)
            return {"loss": losses["loss_box"] * (random.random() + np.random.rand())}

    monkeypatch.setattr(train_module, "build_model", lambda cfg: Draws(norm=True, dropout=0.5))
    train(tiny.config(data_set, tmp_path / "a"))
    train_in_two(tiny.config(data_set, tmp_path / "b"))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def _train_both(_, whole, halves):
    train_module.build_model = _noisy
    train(whole)
    train_in_two(halves)


def test_each_rank_resumes_its_own_state(data_set, tmp_path):
    whole, halves = (tiny.config(data_set, tmp_path / name) for name in "ab")
    run_ranks(_train_both, 2, whole, halves)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    first, second = read_checkpoint(tmp_path / "a" / "model_final.pth")["ranks"]
    assert not torch.equal(first["buffers"]["norm.running_mean"], second["buffers"]["norm.running_mean"])
    assert not torch.equal(first["random"]["torch"], second["random"]["torch"])


def _train_detector_both(_, whole, halves):
    train(whole)
    train_in_two(halves)


@pytest.mark.slow
def test_three_processes_with_shuffled_rois_resume_to_the_bit(data_set, tmp_path):
    """With two the sum of gradients has one order only."""
    choices = tiny.MASK_RCNN | {"MODEL__ROI_HEADS__SHUFFLE": True, "SOLVER__IMS_PER_BATCH": 3}
    whole, halves = (tiny.config(data_set, tmp_path / name, **choices) for name in "ab")
    run_ranks(_train_detector_both, 3, whole, halves)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_resume_with_another_config_is_refused_and_writes_nothing(data_set, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "build_model", _noisy)
    train(tiny.config(data_set, tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as error:
        train(tiny.config(data_set, tmp_path, SOLVER__BASE_LR=0.5, SEED=1), resume=True)
    assert "SOLVER.BASE_LR was 0.01, is 0.5" in str(error.value) and "SEED was 0, is 1" in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    with pytest.raises(UserError, match=r"trained to iteration 4 already, SOLVER\.MAX_ITER is 3"):
        train(tiny.config(data_set, tmp_path, SOLVER__MAX_ITER=3), resume=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    free = {"DATALOADER__NUM_WORKERS": 1, "SOLVER__CHECKPOINT_PERIOD": 3, "TEST__IMS_PER_BATCH": 2}
    train(tiny.config(data_set, tmp_path, **free), resume=True)  # finished already: nothing left to train
    assert (tmp_path / "model_final.pth").read_bytes() == before[tmp_path / "model_final.pth"]


def test_a_checkpoint_with_old_keys_is_compared_by_their_new_names(data_set, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "build_model", lambda cfg: tiny.Regressor())
    key = "MODEL__NORM__GHOSTBN__SAMPLES_PER_GROUP"
    train(tiny.config(data_set, tmp_path / "out", SOLVER__MAX_ITER=2, **{key: 4}))
    file = last_checkpoint(tmp_path / "out")
    checkpoint = read_checkpoint(file)
    old = r"(GHOSTBN:\s+(?:NUM_SAMPLE_GROUPS: 0\s+)?)SAMPLES_PER_GROUP"
    checkpoint["config"] = re.sub(old, r"\1GROUP_SIZE", checkpoint["config"])
    assert "GROUP_SIZE: 4" in checkpoint["config"]
    torch.save(checkpoint, file)
    train(tiny.config(data_set, tmp_path / "out", SOLVER__MAX_ITER=3, **{key: 4}), resume=True)
    torch.save(checkpoint, last_checkpoint(tmp_path / "out"))
    with pytest.raises(UserError, match=r"MODEL\.NORM\.GHOSTBN\.SAMPLES_PER_GROUP was 4, is 8"):
        train(tiny.config(data_set, tmp_path / "out", SOLVER__MAX_ITER=3, **{key: 8}), resume=True)


def test_a_run_in_steps_may_be_made_longer(data_set, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "build_model", _noisy)
    train(tiny.config(data_set, tmp_path / "whole"))
    train(tiny.config(data_set, tmp_path / "parts", SOLVER__MAX_ITER=2))
    train(tiny.config(data_set, tmp_path / "parts"), resume=True)
    whole, parts = (read_checkpoint(tmp_path / name / "model_final.pth")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    cosine = {"SOLVER__LR_SCHEDULER": "cosine"}
    train(tiny.config(data_set, tmp_path / "cosine", SOLVER__MAX_ITER=2, **cosine))
    with pytest.raises(UserError, match=r"SOLVER\.MAX_ITER was 2, is 4"):
        train(tiny.config(data_set, tmp_path / "cosine", **cosine), resume=True)


def test_resume_without_a_checkpoint_starts(data_set, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "build_model", _noisy)
    train(tiny.config(data_set, tmp_path, SOLVER__MAX_ITER=1), resume=True)
    assert read_checkpoint(tmp_path / "model_final.pth")["iteration"] == 1


def test_resume_from_bare_weights_is_refused(data_set, tmp_path):
    save_checkpoint(tmp_path, "model_final.pth", {"model": {}})
    with pytest.raises(UserError, match="'config' is not in it"):
        train(tiny.config(data_set, tmp_path), resume=True)


# --- saving ---------------------------------------------------------------------------------------------------------


def test_killed_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, "model_final.pth", {"iteration": 1})

    def half(state, stream):
        stream.write(b"half of it")
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        torch.save = half
        save_checkpoint(tmp_path, "model_final.pth", {"iteration": 2})
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert read_checkpoint(last_checkpoint(tmp_path)) == {"iteration": 1}
    save_checkpoint(tmp_path, "model_final.pth", {"iteration": 3})
    assert read_checkpoint(last_checkpoint(tmp_path)) == {"iteration": 3}
    assert {path.name for path in tmp_path.iterdir()} == {"model_final.pth", "last_checkpoint"}


def test_an_error_while_saving_leaves_the_old_checkpoint(tmp_path):
    save_checkpoint(tmp_path, "a.pth", {"iteration": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(tmp_path, "a.pth", {"iteration": lambda: 2})
    assert read_checkpoint(last_checkpoint(tmp_path)) == {"iteration": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "last_checkpoint"}


# --- reading --------------------------------------------------------------------------------------------------------


def message_of(file):
    with pytest.raises(UserError) as error:
        read_checkpoint(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_no_checkpoint(tmp_path):
    file = tmp_path / "a.pth"
    assert "no such file" in message_of(file)
    torch.save({"model": nn.Linear(100, 100).state_dict()}, file)
    whole = file.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "broken" in message_of(file), size
    file.write_text("these are not weights")
    assert "broken" in message_of(file)
    torch.save([1, 2], file)
    assert "expected a state_dict, got list" in message_of(file)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    torch.save({"model": Harm()}, tmp_path / "a.pth")
    assert "refused, because it holds posix.mkdir" in message_of(tmp_path / "a.pth")
    assert not (tmp_path / "harm").exists()


def test_weights_that_do_not_fit_are_named_and_not_loaded():
    model = nn.Sequential(nn.Linear(2, 3), DomainBatchNorm(3, num_domains=2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    state["0.weight"] = torch.zeros(4, 2)
    state["head.bias"] = state.pop("0.bias")
    with pytest.raises(UserError) as error:
        load_weights(model, state, "other.pth")
    message = str(error.value)
    assert message.startswith("other.pth: ") and "\n" not in message
    assert "missing 0.bias; unexpected head.bias; mismatched 0.weight (got [4, 2], expected [3, 2])" in message
    assert_same(dict(model.state_dict()), before)


def test_many_mismatches_name_the_first():
    with pytest.raises(UserError, match=r"missing 0\.weight, 0\.bias, 1\.weight and 3 more$"):
        load_weights(nn.Sequential(*(nn.Linear(1, 1) for _ in range(3))), {}, "empty.pth")


def test_shared_statistics_load_into_one_per_domain():
    shared = DomainBatchNorm(3)
    nn.init.uniform_(shared.running_mean)
    model = DomainBatchNorm(3, num_domains=2)
    load_weights(model, shared.state_dict(), "shared.pth")
    assert torch.equal(model.running_mean, shared.running_mean.expand(2, 3))
