"""tools/studies/audit_cost.py: faults are what their names say, remedies undo them, rows are what a study reads."""

import json
import sys
from pathlib import Path

import pytest
import torch

import domainnorm as dn
from domainnorm.data import shapes

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "studies"))

import audit_cost
from study_rows import STUDIES

CONFIG = Path(__file__).parents[2] / "configs" / "studies" / "table5" / "row4.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of a few steps in the folder of a study, and few images."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOMAINNORM_DATA", str(folder / "data"))
        patch.setattr(shapes, "COUNTS", {"train": 8, "val": 2})
        patch.setattr(audit_cost, "RECOMPUTED", 8)
        patch.setattr(audit_cost, "IMAGES", 8)
        out = folder / "table5" / "row4" / "seed-0"
        options = ["SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 2]
        options += ["SOLVER.IMS_PER_BATCH", 4, "MODEL.BACKBONE.NAME", "mobilenet_v3_small", "OUTPUT_DIR", str(out)]
        dn.train(dn.load_config(str(CONFIG), [*options, "TEST.STATISTICS", "[population]"]))
        yield out


@pytest.fixture
def case(run):
    cfg = audit_cost.config_of(run / "model_final.pth", None, ["OUTPUT_DIR", str(run.parent / "used")])
    cfg.defrost()
    return audit_cost.Case(dn.build_model(cfg, trained=True), cfg, run / "model_final.pth")


def plant(case, name):
    with torch.no_grad():
        audit_cost.FAULTS[name](case)


def buffers(case):
    return {name: value.clone() for name, value in case.model.named_buffers() if "running" in name}


pytestmark = pytest.mark.slow  # the training


@pytest.mark.parametrize("name", audit_cost.FAULTS)
def test_each_is_planted(case, name):
    before = buffers(case)
    cfg = case.cfg.clone()
    plant(case, name)
    changed = any(not torch.equal(value, before[key]) for key, value in buffers(case).items())
    elsewhere = ("as_trained", "large_eps", "averaged", "raw_pixels", "other_images")
    assert changed == (name not in elsewhere)
    assert (case.cfg == cfg) == (name not in ("other_images", "padding"))


def test_small_momentum(case):
    before = buffers(case)
    plant(case, "small_momentum")
    left = 0.999**4
    for key, value in buffers(case).items():
        initial = 1.0 if key.endswith("var") else 0.0
        assert torch.allclose(value, left * initial + (1 - left) * before[key])


def test_averages_of_checkpoints(case, run):
    files = [run / "model_0000002.pth", run / "model_final.pth"]
    first, last = (torch.load(file, weights_only=True)["model"] for file in files)
    plant(case, "averaged")
    name, weight = next(iter(case.model.named_parameters()))
    assert torch.allclose(weight, (first[name] + last[name]) / 2) and not torch.equal(first[name], last[name])


def test_remedies_of_levels(case):
    """Shared and apart again, recomputed each time."""
    case.recompute()
    before = buffers(case)
    audit_cost.shared(case)
    head = next(case.norms("head"))
    assert head.running_mean.dim() == 1 and head.num_batches_tracked.dim() == 0
    audit_cost.per_level(case)
    after = buffers(case)
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert all(torch.allclose(before[key], after[key]) for key in before)


def test_a_row(run, tmp_path, monkeypatch):
    """What is named first decides on the remedy."""
    monkeypatch.setattr(sys, "argv", ["x", "never_updated", str(run), "--out", str(tmp_path / "one")])
    audit_cost.main()
    found = json.loads((tmp_path / "one" / "results.json").read_text())
    assert found["named"] == found["findings"][0] == "error: frozen: never updated"
    assert "recompute_population_statistics" in found["remedy"]
    study = STUDIES["audit"]
    assert all(isinstance(study.value("sound", found, column), float) for column in study.columns)
    sound = json.loads((run / "results.json").read_text())["population"]["bbox"]["AP"]
    assert found["sound"] == sound
    other = run.parents[1] / "row9" / "seed-0"
    other.mkdir(parents=True)
    (other / "results.json").write_text(json.dumps({"population": {"bbox": {"AP": 12.5}}}))
    rows = ["--sound", "table5/row9", "--repaired", "table5/row9"]
    monkeypatch.setattr(sys, "argv", ["x", "as_trained", *rows, str(run), "--out", str(tmp_path / "two")])
    audit_cost.main()
    found = json.loads((tmp_path / "two" / "results.json").read_text())
    assert found["sound"] == found["after"] == 12.5 and found["before"] == sound


def test_statistics_without_padding(case, monkeypatch):
    """Each batch has images of one shape, in the sizes of the training."""
    own = case.cfg.INPUT.MIN_SIZE_TRAIN
    plant(case, "padding")
    sizes = []
    case.model.transform.register_forward_hook(lambda _, args, output: sizes.append({x.shape for x in args[0]}))
    monkeypatch.setattr(audit_cost, "RECOMPUTED", 32)
    audit_cost.no_padding(case)
    assert sizes and all(len(shapes) == 1 for shapes in sizes)
    assert own == case.cfg.INPUT.MIN_SIZE_TRAIN and all(128 in shape for shapes in sizes for shape in shapes)
