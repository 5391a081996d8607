"""The training loop: equal programs, the schedule, the weight-decay groups, what stops it."""

import json
import logging
import sys

import numpy as np
import pytest
import tiny
import torch
from ranks import run_ranks
from torch import nn

from domainnorm.config import UserError, load_config
from domainnorm.data.classes import with_classes
from domainnorm.distributed import launch, rank
from domainnorm.engine import train
from domainnorm.engine.log import TrainingLog
from domainnorm.engine.optim import build_optimizer, clip_gradients, learning_rate, warn_about_schedule
from domainnorm.layers import DomainBatchNorm

train_module = sys.modules["domainnorm.engine.train"]  # the package's attribute of this name is the function


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def small_model(monkeypatch):
    monkeypatch.setattr(train_module, "build_model", lambda cfg: tiny.Regressor())


def weights_of(file):
    return torch.load(file, weights_only=True)["model"]


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


# --- the loop -------------------------------------------------------------------------------------------------------


def test_the_loop_is_sgd(data_set, tmp_path, small_model):
    """Against the loop written out by hand, on the same batches."""
    cfg = tiny.config(data_set, tmp_path, SOLVER__BASE_LR=0.1, SOLVER__MOMENTUM=0.9, SOLVER__STEPS=[2])
    trained = train(cfg)

    torch.manual_seed(cfg.SEED)
    model = tiny.Regressor()
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    batches = train_module.train_loader(cfg, rank=0, world_size=1)
    for iteration in range(cfg.SOLVER.MAX_ITER):
        losses = model(*next(batches))
        gradients = torch.autograd.grad(sum(losses.values()), list(model.parameters()))
        for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
            momentum[name] = 0.9 * momentum[name] + gradient + 1e-4 * p.detach()
            p.data -= (0.1 if iteration < 2 else 0.01) * momentum[name]
    for a, b in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_accumulation_equals_the_whole_batch(data_set, tmp_path, small_model):
    whole = train(tiny.config(data_set, tmp_path / "1", SOLVER__BASE_LR=0.1))
    shares = train(tiny.config(data_set, tmp_path / "4", SOLVER__BASE_LR=0.1, SOLVER__ACCUMULATE=4))
    for a, b in zip(whole.parameters(), shares.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    one, other = metrics_of(tmp_path / "1")[-1], metrics_of(tmp_path / "4")[-1]
    assert one["total_loss"] == pytest.approx(other["total_loss"], rel=1e-6)  # losses are logged in float32


def _train_regressor(_, cfg):
    train_module.build_model = lambda cfg: tiny.Regressor()
    train(cfg)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one(data_set, tmp_path, small_model, accumulate):
    choices = {"SOLVER__BASE_LR": 0.1, "SOLVER__ACCUMULATE": accumulate}
    train(tiny.config(data_set, tmp_path / "1", **choices))
    run_ranks(_train_regressor, 2, tiny.config(data_set, tmp_path / "2", **choices))
    one, two = (weights_of(tmp_path / n / "model_final.pth") for n in "12")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-12, atol=1e-14)
    losses = [metrics_of(tmp_path / n)[-1]["total_loss"] for n in "12"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # of all ranks, not of rank 0


def test_a_detector_learns_and_leaves_the_output_folder(data_set, tmp_path):
    cfg = tiny.config(
        data_set, tmp_path, DATASETS__TEST=[data_set], TEST__EVAL_PERIOD=3, SOLVER__MAX_ITER=5, SOLVER__BASE_LR=0.02
    )
    model = train(cfg)
    assert model.training
    names = {path.name for path in tmp_path.iterdir() if "tfevents" not in path.name}
    assert names == {
        *("config.yaml", "log.txt", "metrics.json", "results.json", "inference", "last_checkpoint"),
        *("model_0000002.pth", "model_0000003.pth", "model_0000004.pth"),  # before an evaluation, too
        *("model_final.pth", "model_best.pth"),
    }
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert load_config(tmp_path / "config.yaml") == with_classes(cfg, ["kind 3", "kind 7"])
    lines = metrics_of(tmp_path)
    assert [line["iteration"] for line in lines] == [3, 5, 5]  # evaluation, training, evaluation
    assert {"lr", "total_loss", "loss_cls", "loss_box_reg", "time", "data_time", "eta_seconds"} <= lines[1].keys()
    assert lines[1]["total_loss"] == pytest.approx(lines[1]["loss_cls"] + lines[1]["loss_box_reg"])
    assert "population/bbox/AP" in lines[0]
    assert "iteration 5/5" in (tmp_path / "log.txt").read_text()


def test_bfloat16_autocast(data_set, tmp_path, monkeypatch):
    seen = []

    class Watch(tiny.Regressor):
        def forward(self, images, targets=None):
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            return super().forward(images, targets)

    monkeypatch.setattr(train_module, "build_model", lambda cfg: Watch())
    for enabled in (False, True):
        folder = tmp_path / str(enabled)
        train(tiny.config(data_set, folder, SOLVER__MAX_ITER=1, SOLVER__AMP__ENABLED=enabled))
    assert seen == [None, torch.bfloat16]


# --- what stops it --------------------------------------------------------------------------------------------------


class Explodes(tiny.Regressor):
    """Its loss is nan in the third forward, on one rank."""

    def __init__(self, on_rank=0):
        super().__init__()
        self.on_rank, self.calls = on_rank, 0

    def forward(self, images, targets=None):
        self.calls += 1
        losses = super().forward(images, targets)
        if self.calls == 3 and rank() == self.on_rank:
            losses["loss_size"] = losses["loss_size"] * float("nan")
        return losses


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(data_set, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "build_model", lambda cfg: Explodes())
    with pytest.raises(UserError) as error:
        train(tiny.config(data_set, tmp_path))
    assert "iteration 3" in str(error.value) and "loss_size nan" in str(error.value) and ".png" in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000002.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "model_0000002.pth").values())


def _explode_on_rank_1(cfg):
    train_module.build_model = lambda cfg: Explodes(on_rank=1)
    train(cfg)


class BadGradient(tiny.Regressor):
    """A finite loss whose gradient is nan in the third forward."""

    calls = 0

    def forward(self, images, targets=None):
        self.calls += 1
        losses = super().forward(images, targets)
        if self.calls == 3:
            zero = (losses["loss_size"] * 0).sqrt()  # its derivative at 0 is infinite, times 0
            losses["loss_size"] = losses["loss_size"] + zero
        return losses


@pytest.mark.parametrize("clip", [True, False])
def test_a_gradient_that_is_not_finite_reaches_no_weight(data_set, tmp_path, monkeypatch, clip):
    monkeypatch.setattr(train_module, "build_model", lambda cfg: BadGradient())
    with pytest.raises(UserError, match=r"gradient is not finite at iteration 3: norm nan; images of rank 0: \d\.png"):
        train(tiny.config(data_set, tmp_path, SOLVER__CLIP_GRADIENTS__ENABLED=clip))
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000002.pth"]


def test_a_model_that_is_not_finite_is_not_saved(data_set, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "build_model", lambda cfg: tiny.Regressor())
    with pytest.raises(UserError, match="model is not finite at iteration 1: norm of its weights inf"):
        train(tiny.config(data_set, tmp_path, SOLVER__BASE_LR=1e308, SOLVER__CHECKPOINT_PERIOD=1))
    assert not list(tmp_path.glob("*.pth")) and not (tmp_path / "last_checkpoint").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(data_set, tmp_path):
    with pytest.raises(UserError, match=r"iteration 3.*rank 1"):
        launch(_explode_on_rank_1, (tiny.config(data_set, tmp_path),), num_processes=2)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000002.pth"]


def test_an_output_folder_that_cannot_be_made(data_set, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="OUTPUT_DIR"):
        train(tiny.config(data_set, tmp_path / "file" / "out"))


@pytest.mark.slow
def test_mistakes_in_the_input_show_before_anything_is_written(data_set, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json"):
        train(tiny.config(data_set, tmp_path / "out", DATASETS__TEST=["nowhere.json:images"]))
    with pytest.raises(UserError, match="IMS_PER_BATCH 3"):
        launch(train, (tiny.config(data_set, tmp_path / "out", SOLVER__IMS_PER_BATCH=3),), num_processes=2)
    assert not (tmp_path / "out").exists()


# --- the optimizer --------------------------------------------------------------------------------------------------


def schedule(*iterations, **options):
    words = [w for key, value in options.items() for w in (f"SOLVER.{key}", value)]
    cfg = load_config(None, words)
    return [learning_rate(cfg, iteration) for iteration in iterations]


def test_learning_rate_in_steps():
    options = {"BASE_LR": 0.1, "MAX_ITER": 100, "STEPS": [50, 80], "GAMMA": 0.5, "WARMUP_ITERS": 10}
    rates = schedule(0, 5, 9, 10, 49, 50, 79, 80, 99, WARMUP_FACTOR=0.2, **options)
    assert rates == pytest.approx([0.02, 0.06, 0.092, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025])


def test_learning_rate_cosine():
    options = {"BASE_LR": 0.1, "MAX_ITER": 100, "LR_SCHEDULER": "cosine", "WARMUP_ITERS": 0}
    assert schedule(0, 25, 50, 75, **options) == pytest.approx([0.1, 0.05 + 0.05 / 2**0.5, 0.05, 0.05 - 0.05 / 2**0.5])
    assert 0 < schedule(99, **options)[0] < 1e-4


@pytest.mark.parametrize("peak", [0.3, 0.5])
def test_learning_rate_one_cycle(peak):
    options = {"BASE_LR": 0.1, "MAX_ITER": 100, "LR_SCHEDULER": "one_cycle", "WARMUP_ITERS": 0, "ONE_CYCLE_PEAK": peak}
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=101, pct_start=(100 * peak + 1) / 101)
    rates = []
    for _ in range(100):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step(), theirs.step()
    assert schedule(*range(100), **options) == pytest.approx(rates, rel=1e-6)


def test_steps_that_are_never_reached_are_said_and_ignored(caplog):
    assert schedule(19, BASE_LR=0.1, MAX_ITER=20, STEPS=[10, 20, 30], WARMUP_ITERS=0) == pytest.approx([0.01])
    with caplog.at_level(logging.WARNING):
        options = ["SOLVER.STEPS", [10, 20, 30], "SOLVER.FREEZE_NORM_AT", 20, "SOLVER.AVERAGE_WEIGHTS_FROM", 0.5]
        warn_about_schedule(load_config(None, ["SOLVER.MAX_ITER", 20, *options]))
    assert "[20, 30]" in caplog.text and "WARMUP_ITERS" in caplog.text
    assert "FREEZE_NORM_AT 20: never reached" in caplog.text and "AVERAGE_WEIGHTS_FROM" not in caplog.text


def test_weight_decay_groups_hold_each_parameter_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), DomainBatchNorm(4), nn.GroupNorm(2, 4), nn.Linear(4, 4))
    shared = nn.Sequential(model, model[0], model[1])
    frozen = nn.Linear(4, 4).requires_grad_(False)
    whole = nn.ModuleList([shared, frozen])
    words = ["SOLVER.WEIGHT_DECAY", 0.3, "SOLVER.WEIGHT_DECAY_NORM", 0.1, "SOLVER.WEIGHT_DECAY_BIAS", 0.2]
    optimizer = build_optimizer(load_config(None, words), whole)
    groups = {group["weight_decay"]: set(group["params"]) for group in optimizer.param_groups}
    assert groups == {
        0.1: {*model[1].parameters(), *model[2].parameters()},
        0.2: {model[0].bias, model[3].bias},
        0.3: {model[0].weight, model[3].weight},
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 8


def test_optimizers_of_the_config():
    model = nn.Linear(2, 2)
    assert isinstance(build_optimizer(load_config(None, ["SOLVER.OPTIMIZER", "AdamW"]), model), torch.optim.AdamW)
    words = ["SOLVER.ADAM_BETAS", [0.8, 0.99], "SOLVER.OPTIMIZER_EPS", 0.1, "SOLVER.RMSPROP_ALPHA", 0.9]
    adam, rms = (
        build_optimizer(load_config(None, ["SOLVER.OPTIMIZER", k, *words]), model) for k in ("Adam", "RMSprop")
    )
    assert type(adam) is torch.optim.Adam and (adam.defaults["betas"], adam.defaults["eps"]) == ((0.8, 0.99), 0.1)
    assert type(rms) is torch.optim.RMSprop
    assert (rms.defaults["alpha"], rms.defaults["momentum"], rms.defaults["eps"]) == (0.9, 0.9, 0.1)
    sgd = build_optimizer(load_config(None, ["SOLVER.MOMENTUM", 0.8, "SOLVER.NESTEROV", True]), model)
    assert sgd.defaults["momentum"] == 0.8 and sgd.defaults["nesterov"]


def test_gradient_clipping():
    model = nn.Linear(1, 2, bias=False)

    def clipped(*words):
        model.weight.grad = torch.tensor([[3.0], [-4.0]])
        clip_gradients(load_config(None, words), model)
        return model.weight.grad.flatten().tolist()

    enabled = ("SOLVER.CLIP_GRADIENTS.ENABLED", True)
    assert clipped() == [3, -4]
    assert clipped(*enabled) == pytest.approx([0.6, -0.8])
    assert clipped(*enabled, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value") == [1, -1]


# --- the log --------------------------------------------------------------------------------------------------------


def test_metrics_beyond_the_start_are_dropped(tmp_path):
    lines = ['{"iteration": 20}', '{"iteration": 40}', '{"iteration": 60}', '{"iterat']
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    TrainingLog(tmp_path, 40, 100, torch.device("cpu")).close()
    assert [line["iteration"] for line in metrics_of(tmp_path)] == [20, 40]


def test_a_line_every_twenty_iterations_averages_them(tmp_path, caplog):
    caplog.set_level("INFO")
    log = TrainingLog(tmp_path, 0, 50, torch.device("cpu"))
    for iteration in range(1, 51):
        log.step(iteration, {"a": float(iteration), "b": 1.0}, 0.1, 2.0, 0.5)
    log.evaluation(50, {"population": {"bbox": {"AP": 1.0, "APl": float("nan")}}})
    log.close()
    lines = metrics_of(tmp_path)
    assert [line["iteration"] for line in lines] == [20, 40, 50, 50]
    assert [line["a"] for line in lines[:3]] == [np.mean(range(1, 21)), np.mean(range(21, 41)), np.mean(range(31, 51))]
    assert lines[0]["total_loss"] == lines[0]["a"] + 1
    assert lines[0]["eta_seconds"] == 60 and lines[0]["time"] == 2 and lines[0]["data_time"] == 0.5
    assert lines[0]["max_memory_mb"] > 100  # torch is loaded
    shown = [record.getMessage() for record in caplog.records if "eta" in record.getMessage()]
    assert len(shown) == 3
    for word in ("iteration 20/50", "eta 0:01:00", "total_loss", "a 10.5", "time 2.0", "data 0.5", "lr 0.1", "memory "):
        assert word in shown[0]
    assert lines[3] == {"iteration": 50, "population/bbox/AP": 1.0, "population/bbox/APl": None}
