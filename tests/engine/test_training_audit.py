"""Audits while a model trains: they change nothing, and what they write is what `dn.audit` finds."""

import json
import logging
import math

import pytest
import tiny
import torch
from ranks import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import domainnorm as dn
from domainnorm.auditing.checks import CHEAP
from domainnorm.distributed import gather_objects
from domainnorm.engine import train
from domainnorm.engine.audit import FIGURES, TrainingAudit, audit_batches
from domainnorm.layers import DomainBatchNorm
from domainnorm.modeling.checkpoint_file import read_checkpoint

NAMES = {"audit/errors", "audit/warnings", *(f"audit/{name}" for name in FIGURES)}


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "set")


def audited(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [line for line in lines if "audit/errors" in line]


def assert_same(one, other):
    """Models and optimizers of two checkpoints, to the bit."""
    one, other = (read_checkpoint(folder / "model_final.pth") for folder in (one, other))
    assert one["model"].keys() == other["model"].keys() and len(one["model"]) > 3
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    for k, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, other["optimizer"]["state"][k][name])
    for mine, its in zip(one["ranks"], other["ranks"], strict=True):
        assert torch.equal(mine["random"]["torch"], its["random"]["torch"])
        assert all(torch.equal(value, its["buffers"][name]) for name, value in mine["buffers"].items())


CASES = {
    "retinanet": {},
    "accumulate": {"SOLVER__ACCUMULATE": 2, "SOLVER__VIRTUAL_BATCH": 1, "MODEL__RETINANET__SGD_STATISTICS": "shared"},
    "mask_rcnn": {**tiny.MASK_RCNN, "MODEL__ROI_HEADS__SHUFFLE": True},
    "domains": {"MODEL__NORM_DOMAINS": "dataset", "MODEL__RETINANET__NORM": "BN"},
    "frozen": {"SOLVER__FREEZE_NORM_AT": 2, "SOLVER__AVERAGE_WEIGHTS": "EMA"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_with_audits_is_the_same_to_the_bit(data_set, tmp_path, case):
    options = {"SOLVER__BASE_LR": 0.02, **CASES[case]}
    if case == "domains":
        other = tiny.write_dataset(tmp_path / "other")
        options |= {"DATASETS__TRAIN": [data_set, other], "DATASETS__DOMAINS": ["day", "night"]}
    for period in (0, 2):
        train(tiny.config(data_set, tmp_path / str(period), TEST__AUDIT_PERIOD=period, **options))
    assert_same(tmp_path / "0", tmp_path / "2")
    assert [line["iteration"] for line in audited(tmp_path / "2")] == [2, 4] and audited(tmp_path / "0") == []


def test_so_is_one_with_dropout_in_bfloat16(data_set, tmp_path):
    for period in (0, 1):
        torch.manual_seed(0)
        options = {"SOLVER__BASE_LR": 0.1, "SOLVER__AMP__ENABLED": True, "SOLVER__AMP__DTYPE": "bfloat16"}
        cfg = tiny.config(data_set, tmp_path / str(period), TEST__AUDIT_PERIOD=period, **options)
        train(cfg, model=tiny.Regressor(norm=True, dropout=0.5))
    assert_same(tmp_path / "0", tmp_path / "1")
    assert len(audited(tmp_path / "1")) == 4


def _train(rank, *configs):
    for cfg in configs:
        train(cfg)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_so_are_two_processes(data_set, tmp_path, norm):
    mask = {**tiny.MASK_RCNN, "MODEL__ROI_HEADS__SHUFFLE": True, "MODEL__ROI_BOX_HEAD__NORM": norm}
    mask |= {"MODEL__BACKBONE__NORM": norm, "MODEL__ROI_MASK_HEAD__NORM": norm}
    options = {"SOLVER__BASE_LR": 0.02, "SOLVER__MAX_ITER": 3, **mask}
    configs = [tiny.config(data_set, tmp_path / str(k), TEST__AUDIT_PERIOD=k, **options) for k in (0, 1)]
    run_ranks(_train, 2, *configs)
    assert_same(tmp_path / "0", tmp_path / "1")
    lines = audited(tmp_path / "1")
    assert [line["iteration"] for line in lines] == [1, 2, 3] and lines[0].keys() == {"iteration", *NAMES}
    assert lines[0]["audit/samples"] == (4 if norm == "SyncBN" else 2)  # images


def test_what_is_written_is_what_the_audit_finds(data_set, tmp_path):
    """The figures after the last step are those of the model that was saved, on that step's images."""
    kept = {}

    class Kept(tiny.Regressor):
        def forward(self, images, targets=None):
            kept["batch"] = kept["batch"] if targets is None else (images, targets)
            return super().forward(images, targets)

    torch.manual_seed(0)
    out = tmp_path / "out"
    cfg = tiny.config(data_set, out, TEST__AUDIT_PERIOD=2, SOLVER__MAX_ITER=4, SOLVER__BASE_LR=0.1)
    model = train(cfg, model=Kept(norm=True))
    report = audit_batches(cfg, model, [kept["batch"]], checks=CHEAP, progress=False)
    (row,) = report.layers
    first, last = audited(out)
    assert last == {
        "iteration": 4,
        "audit/errors": report.counts["error"],
        "audit/warnings": report.counts["warning"],
        "audit/divergence": row["inference"],
        "audit/drift": row["drift"],
        "audit/samples": 4,
        "audit/rounded": row["rounded"],
        "audit/dead_channels": row["dead_channels"],
        "audit/initial_weight": pytest.approx(0.9**4),
    }
    assert first["audit/initial_weight"] == pytest.approx(0.9**2) and last["audit/errors"] > 0
    events = EventAccumulator(str(out))
    events.Reload()
    assert [event.step for event in events.Scalars("audit/divergence")] == [2, 4]
    assert events.Scalars("audit/drift")[-1].value == pytest.approx(row["drift"], rel=1e-6)
    text = (out / "log.txt").read_text()
    assert f"iteration 4/4  audit  {int(last['audit/errors'])} error" in text
    assert f"divergence {row['inference']:.3g} (norm)" in text
    for finding in report.findings:  # each is told once
        assert text.count(f"audit: {finding.level}: {finding.message.split(',')[0].split(' are ')[0][:20]}") == 1


class Record:
    """In place of a log."""

    def write(self, iteration, metrics, text):
        self.metrics, self.text = metrics, text


def _worst_of_ranks(rank, cfg):
    torch.manual_seed(0)
    model = tiny.Regressor(norm=True).train()
    images = [torch.rand(3, 8, 8) + 5 * rank + k for k in range(2)]
    targets = [{"boxes": torch.rand(1, 4)} for _ in range(2)]
    log = Record()
    logging.disable()
    TrainingAudit(cfg, model, torch.optim.SGD(model.parameters(), 0.1), log)(3, images, targets)
    own = audit_batches(cfg, model, [(images, targets)], checks=CHEAP, progress=False)
    return gather_objects(own.layers[0]["inference"]), getattr(log, "metrics", None), getattr(log, "text", None)


@pytest.mark.distributed
def test_the_worst_rank_counts(data_set, tmp_path):
    (values, metrics, text), (_, others, _) = run_ranks(_worst_of_ranks, 2, tiny.config(data_set, tmp_path / "out"))
    assert values[1] > 2 * values[0] and metrics["audit/divergence"] == values[1]
    assert metrics["audit/errors"] == 1 and text.startswith("audit  1 error  ")
    assert "divergence" in text and "(norm)" in text
    assert others is None  # rank 0 writes


def test_a_model_without_norms(data_set, tmp_path):
    train(tiny.config(data_set, tmp_path / "out", TEST__AUDIT_PERIOD=4), model=tiny.Regressor())
    assert audited(tmp_path / "out") == [{"iteration": 4, "audit/errors": 0, "audit/warnings": 0}]


def test_a_run_that_goes_on_keeps_its_audits(data_set, tmp_path):
    options = {"TEST__AUDIT_PERIOD": 2, "DATASETS__TEST": [data_set]}
    for steps in (2, 4):
        cfg = tiny.config(data_set, tmp_path / "out", SOLVER__MAX_ITER=steps, **options)
        train(cfg, model=tiny.Regressor(norm=True), resume=True)
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    kinds = [(line["iteration"], next(name for name in line if name != "iteration")) for line in lines]
    assert [kind for kind in kinds if kind[1] == "audit/errors"] == [(2, "audit/errors"), (4, "audit/errors")]
    assert all(math.isfinite(line["audit/divergence"]) for line in lines if "audit/errors" in line)
    assert any("population/bbox/AP" in line for line in lines if line["iteration"] == 4)


def test_the_model_is_as_it_was(data_set, tmp_path):
    """Its hooks, modes and domains in use, too."""
    cfg = tiny.config(data_set, tmp_path / "out")
    model = dn.build_model(cfg).train()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images, targets = (
        [torch.rand(3, 64, 64) for _ in range(4)],
        [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([0])} for _ in range(4)],
    )
    before = torch.get_rng_state()
    TrainingAudit(cfg, model, torch.optim.SGD(model.parameters(), 0.1), Record())(1, images, targets)
    assert [module.training for module in model.modules()] == modes and model.head.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(before, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    norms = [module for module in model.modules() if isinstance(module, DomainBatchNorm)]
    assert norms and all(norm.batch_hook is None and norm.statistics == "auto" for norm in norms)


def test_it_is_off_unless_the_config_says_so():
    assert dn.load_config(None, []).TEST.AUDIT_PERIOD == 0
    with pytest.raises(dn.UserError, match=r"TEST\.AUDIT_PERIOD"):
        dn.load_config(None, ["TEST.AUDIT_PERIOD", -1])
