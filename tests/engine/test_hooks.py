"""Hooks: what they see, when they are called, what they write."""

import json

import pytest
import tiny
import torch

import domainnorm as dn
from domainnorm.engine import HookBase, train


@pytest.fixture
def data_set(tmp_path):
    return tiny.write_dataset(tmp_path / "set")


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


class Record(HookBase):
    def __init__(self):
        self.calls = []

    def before_train(self):
        assert (self.trainer.start_iter, self.trainer.max_iter) == (self.trainer.iter, 4)
        self.calls.append("before_train")

    def before_step(self):
        self.weight = self.trainer.model.linear.weight.detach().clone()
        self.calls.append(f"before {self.trainer.iter}")

    def after_step(self):
        assert not torch.equal(self.weight, self.trainer.model.linear.weight)
        assert self.trainer.losses.keys() == {"loss_box", "loss_size"}
        assert isinstance(self.trainer.optimizer, torch.optim.SGD)
        self.calls.append(f"after {self.trainer.iter}")

    def after_train(self):
        self.calls.append(f"after_train {self.trainer.iter}")


def test_hooks_are_called_around_the_run_and_each_step(data_set, tmp_path):
    record, seen = Record(), []
    cfg = tiny.config(data_set, tmp_path / "out", SOLVER__BASE_LR=0.1)
    train(cfg, model=tiny.Regressor(), hooks=[record, lambda trainer: seen.append(trainer.iter)])
    steps = [f"{when} {k}" for k in range(4) for when in ("before", "after")]
    assert record.calls == ["before_train", *steps, "after_train 4"] and seen == [0, 1, 2, 3]


class LikeDetectron2:
    """An object with some of the methods, and no base of ours."""

    def after_step(self):
        self.trainer.put_scalar("mine", self.trainer.iter)
        if self.trainer.iter == 3:
            self.trainer.put_scalar("custom/seldom", torch.tensor(7.0))


def test_scalars_go_to_the_metrics(data_set, tmp_path):
    train(tiny.config(data_set, tmp_path / "out"), model=tiny.Regressor(), hooks=[LikeDetectron2()])
    (line,) = metrics_of(tmp_path / "out")
    assert line["mine"] == 1.5 and line["custom/seldom"] == 7 and line["iteration"] == 4


def test_a_scalar_is_written_once(data_set, tmp_path):
    def once(trainer):
        if trainer.iter == 3:
            trainer.put_scalar("once", 1)

    train(tiny.config(data_set, tmp_path / "out", SOLVER__MAX_ITER=40), model=tiny.Regressor(), hooks=[once])
    first, second = metrics_of(tmp_path / "out")
    assert first["once"] == 1 and "once" not in second


def test_after_train_also_after_an_error(data_set, tmp_path):
    record = Record()

    def fail(trainer):
        if trainer.iter == 1:
            raise ZeroDivisionError

    cfg = tiny.config(data_set, tmp_path / "out", SOLVER__BASE_LR=0.1)
    with pytest.raises(ZeroDivisionError):
        train(cfg, model=tiny.Regressor(), hooks=[fail, record])
    assert record.calls[-2:] == ["before 1", "after_train 1"]


@pytest.mark.parametrize("wrong", [3, Record, object()])
def test_what_is_no_hook_is_refused_before_anything_is_written(data_set, tmp_path, wrong):
    with pytest.raises(dn.UserError, match="hooks take functions of the trainer, or objects with one of before_train"):
        train(tiny.config(data_set, tmp_path / "out"), model=tiny.Regressor(), hooks=[wrong])
    assert not (tmp_path / "out").exists()


class Halve(HookBase):
    def after_step(self):
        with torch.no_grad():
            self.trainer.model.linear.bias.mul_(0.5 + 0.1 * self.trainer.iter)


def test_a_run_whose_hook_changes_weights_is_resumed_to_the_bit(data_set, tmp_path):
    def run(folder, resume=False, hooks=(), **choices):
        torch.manual_seed(3)
        cfg = tiny.config(data_set, tmp_path / folder, SOLVER__BASE_LR=0.1, **choices)
        return train(cfg, model=tiny.Regressor(dropout=0.5), hooks=hooks, resume=resume).state_dict()

    whole, without = run("whole", hooks=[Halve()]), run("without")
    run("parts", hooks=[Halve()], SOLVER__MAX_ITER=2)
    parts = run("parts", hooks=[Halve()], resume=True)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not torch.equal(whole["linear.bias"], without["linear.bias"])
