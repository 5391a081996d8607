"""domainnorm audit: runs, checkpoints, and models of any module."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import domainnorm as dn
from domainnorm.cli import audit as command
from domainnorm.cli import main as domainnorm
from domainnorm.config import save_config
from domainnorm.engine import audit as engine_audit
from domainnorm.engine import train
from domainnorm.modeling.checkpoint_file import read_checkpoint, write_checkpoint

TOOL = Path(__file__).parents[2] / "tools" / "audit_net.py"
MODELS = """
import torch
from torch import nn

def shared():
    torch.manual_seed(0)
    norm, level = nn.BatchNorm2d(4), torch.randn(8, 4, 9, 9)
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm
        def forward(self, x):
            return [self.norm(x), self.norm(5 * x + 3)]
    model, batches = Head(), [torch.randn(8, 4, 9, 9) for _ in range(6)]
    with torch.no_grad():
        for _ in range(20):
            for batch in batches:
                model(batch)
    return model.eval(), batches

def healthy():
    model, batches = shared()
    return {"model": nn.Sequential(nn.BatchNorm2d(4, momentum=None)), "batches": batches, "thresholds": {"drift": 50}}

def several():
    model, batches = shared()
    return {"model": model, "batches": {"day": batches, "night": [b + 4 for b in batches]}, "accumulate": 2}

def one(): return 3
def three(): return 1, 2, 3
def unknown(): return {"model": nn.ReLU(), "batches": [], "size": 3}
def no_model(): return "model", []
def no_batches(): return nn.BatchNorm2d(4), []
def scripted(): return torch.jit.script(nn.BatchNorm2d(4)), [torch.randn(2, 4, 3, 3)]
def failing(): return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), [torch.randn(2, 4)]
value = 3
"""


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def trained(data_set, tmp_path_factory):
    """The folder of a run."""
    out = tmp_path_factory.mktemp("runs") / "out"
    train(tiny.config(data_set, out, SOLVER__MAX_ITER=2))
    return out


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The current folder, with a module; what is imported from there is forgotten."""
    name = f"models_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def run(*argv):
    return command.main([str(word) for word in argv])


def audited(tmp_path, *argv, code=0):
    """What a run has written as JSON."""
    file = tmp_path / "found" / "audit.json"
    assert run(*argv, "--json", file) == code
    return json.loads(file.read_text())


def mistake(capsys, *argv):
    assert run(*argv) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and captured.out == ""
    return line


def kinds(content):
    return {finding["kind"] for finding in content["findings"]}


def test_the_folder_of_a_run(trained, tmp_path, capsys):
    content = audited(tmp_path, "--weights", trained, "--number", 10)
    assert (content["model"], content["samples"], content["batches"], content["passes"]) == ("RetinaNet", 12, 3, 3)
    assert "unfinished average" in kinds(content) and not content["not_reached"]
    levels = [row["domain"] for row in content["layers"] if row["layer"] == "head.regression_head.conv.0.1"]
    assert levels == [0, 1, 2, 3, 4]
    assert all(row["samples"] == 4 and row["propagated"] is not None for row in content["layers"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"{content['counts']['error']} error") and "measured: 12 samples in 3 batches" in shown


def test_batches_are_those_of_training(trained, tmp_path):
    """As many images as a forward pass had, of what training resizes and flips them to."""
    elements = {}
    for size in (64, 96):
        options = ["INPUT.MIN_SIZE_TRAIN", f"[{size}]", "INPUT.MAX_SIZE_TRAIN", size, "SOLVER.ACCUMULATE", 2]
        content = audited(tmp_path, "--weights", trained, "--number", 4, *options)
        first = content["layers"][0]
        elements[size] = first["elements"]
        assert (content["batches"], first["samples"]) == (2, 2) and "accumulation" in kinds(content)
    assert elements == {64: 2 * 32**2, 96: 2 * 48**2}


def test_a_config_and_weights(trained, tmp_path):
    expected = audited(tmp_path, "--weights", trained, "--number", 8)
    file = tmp_path / "config.yaml"
    save_config(dn.load_config(trained / "config.yaml"), file)
    weights = ["MODEL.WEIGHTS", trained / "model_final.pth"]
    assert audited(tmp_path, "--config-file", file, "--number", 8, *weights) == expected
    assert audited(tmp_path, "--config-file", file, "--number", 8, "--weights", trained) == expected


def changed(trained, tmp_path, **content):
    file = tmp_path / "changed.pth"
    write_checkpoint(read_checkpoint(trained / "model_final.pth") | content, file)
    return file


def test_a_run_of_several_processes(trained, tmp_path):
    """Each had its share of the images, unless norms are synchronized."""
    ranks = read_checkpoint(trained / "model_final.pth")["ranks"]
    file = changed(trained, tmp_path, ranks=ranks * 2)
    few = audited(tmp_path, "--weights", file, "--number", 8)
    assert few["batches"] == 4 and {row["samples"] for row in few["layers"]} == {2}
    norms = ["MODEL.BACKBONE.NORM", "SyncBN", "MODEL.RETINANET.NORM", "SyncBN"]
    synchronized = audited(tmp_path, "--weights", file, "--number", 8, *norms)
    assert synchronized["batches"] == 2 and {row["samples"] for row in synchronized["layers"]} == {4}


def test_norms_that_training_had_frozen(trained, tmp_path):
    frozen = ["SOLVER.FREEZE_NORM_AT", 1]
    content = audited(tmp_path, "--weights", trained, "--number", 4, *frozen)
    assert content["layers"] and all(row["frozen"] for row in content["layers"])
    file = changed(trained, tmp_path, iteration=1)
    content = audited(tmp_path, "--weights", file, "--number", 4, *frozen)
    assert not any(row["frozen"] for row in content["layers"])


@pytest.mark.slow
def test_mask_rcnn_sees_the_rois_of_training(data_set, tmp_path):
    options = {**tiny.MASK_RCNN, "MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE": 16}
    train(tiny.config(data_set, tmp_path / "out", SOLVER__MAX_ITER=1, **options))
    content = audited(tmp_path, "--weights", tmp_path / "out", "--number", 8)
    (box,) = (row for row in content["layers"] if row["layer"].startswith("roi_heads.box_head"))
    assert box["elements"] == 4 * 16 * 7 * 7 and box["samples"] == 4
    assert any(row["layer"].startswith("roi_heads.mask_head") for row in content["layers"])


@pytest.mark.slow
def test_each_image_has_the_domain_of_its_data_set(data_set, tmp_path):
    other = tiny.write_dataset(tmp_path / "other")
    sets = {"DATASETS__TRAIN": [data_set, other], "DATASETS__DOMAINS": ["day", "night"]}
    levels = {"MODEL__RETINANET__NORM_DOMAINS": "level_and_dataset"}
    train(tiny.config(data_set, tmp_path / "out", SOLVER__MAX_ITER=1, MODEL__NORM_DOMAINS="dataset", **levels, **sets))
    content = audited(tmp_path, "--weights", tmp_path / "out", "--number", 16)
    assert {row["domain"] for row in content["layers"] if row["layer"].startswith("backbone")} == {0, 1}
    assert all(row["samples"] < 4 for row in content["layers"] if row["layer"].startswith("backbone"))


@pytest.mark.slow
def test_a_classifier(tmp_path):
    options = ["MODEL.META_ARCHITECTURE", "Classifier", "MODEL.BACKBONE.NAME", "cifar_resnet20", "MODEL.DEVICE", "cpu"]
    options += ["MODEL.BACKBONE.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0]
    options += ["DATASETS.TRAIN", "[patches_train]", "SOLVER.IMS_PER_BATCH", 16, "SOLVER.MAX_ITER", 1]
    options += ["INPUT.CROP_SIZE", 32, "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path / "out")]
    train(dn.load_config(None, options))
    content = audited(tmp_path, "--weights", tmp_path / "out", "--number", 32)
    assert content["samples"] == 32 and {row["samples"] for row in content["layers"]} == {16}
    assert all(row["propagated"] is not None for row in content["layers"])  # the whole batch is normalized in inference


def test_a_module_of_the_current_folder(models, tmp_path, capsys):
    content = audited(tmp_path, f"{models}:shared")
    assert kinds(content) >= {"shared statistics"} and content["samples"] == 48
    assert "norm is called 2 times" in capsys.readouterr().out


def test_a_page(models, tmp_path):
    pytest.importorskip("matplotlib")
    content = audited(tmp_path, f"{models}:shared", "--html", tmp_path / "new" / "page.html")
    text = (tmp_path / "new" / "page.html").read_text()
    assert "Audit of Head" in text and content["findings"][0]["message"] in text


def test_a_file(models, tmp_path, monkeypatch):
    expected = audited(tmp_path, f"{models}:shared")
    monkeypatch.chdir("/")
    assert audited(tmp_path, f"{tmp_path}/{models}.py:shared") == expected


def test_a_dict_of_arguments(models, tmp_path):
    content = audited(tmp_path, f"{models}:several")
    assert content["samples"] == 96 and {"one set of statistics", "accumulation"} <= kinds(content)
    assert audited(tmp_path, f"{models}:healthy")["thresholds"]["drift"] == 50


def test_thresholds(models, tmp_path):
    quiet = [word for name in ("calls", "consistency", "drift") for word in ("--threshold", f"{name}=1e6")]
    content = audited(tmp_path, f"{models}:shared", *quiet, "--strict")
    assert content["healthy"] and content["thresholds"]["calls"] == 1e6
    assert audited(tmp_path, f"{models}:healthy", "--threshold", "drift=60")["thresholds"]["drift"] == 60


def test_strict_is_for_continuous_integration(models, tmp_path):
    assert run(f"{models}:shared") == 0
    assert audited(tmp_path, f"{models}:shared", "--strict", code=1)["healthy"] is False
    healthy = [f"{models}:healthy", "--threshold", "calls=1e6", "--threshold", "drift=1e6"]
    assert run(*healthy, "--strict") == 0


def test_mistakes_in_one_line(models, trained, tmp_path, capsys):
    name = models
    assert "--config-file, --weights or one module:function, got []" in mistake(capsys)
    assert "got ['a:b', 'c']" in mistake(capsys, "a:b", "c")
    assert "expected module:function" in mistake(capsys, name)
    assert f"there is no module 'absent' here, in {tmp_path}" in mistake(capsys, "absent:model")
    assert "there is no module 'absent.inner'" in mistake(capsys, "absent.inner:model")
    assert "no such file: absent.py" in mistake(capsys, "absent.py:model")
    assert f"{name} has no function 'absent'" in mistake(capsys, f"{name}:absent")
    assert f"{name} has no function 'value'" in mistake(capsys, f"{name}:value")
    assert f"{name}:one returned 3: expected (model, batches), or a dict" in mistake(capsys, f"{name}:one")
    assert "returned (1, 2, 3): expected (model, batches)" in mistake(capsys, f"{name}:three")
    assert "returned ['batches', 'model', 'size']: expected" in mistake(capsys, f"{name}:unknown")
    assert "a model that is 'model': expected an nn.Module" in mistake(capsys, f"{name}:no_model")
    assert "there is no batch" in mistake(capsys, f"{name}:no_batches")
    assert "TorchScript" in mistake(capsys, f"{name}:scripted")
    assert "--threshold takes NAME=VALUE" in mistake(capsys, f"{name}:shared", "--threshold", "drift")
    assert "thresholds take any of" in mistake(capsys, f"{name}:shared", "--threshold", "drit=1")
    assert "takes a positive number" in mistake(capsys, f"{name}:shared", "--threshold", "drift=0")
    assert "--number goes with" in mistake(capsys, f"{name}:shared", "--number", 3)
    assert "--number takes 1 or more" in mistake(capsys, "--weights", trained, "--number", 0)
    assert "MODEL.WEIGHTS is empty" in mistake(capsys, "--config-file", trained / "config.yaml")
    assert "holds no checkpoint" in mistake(capsys, "--weights", tmp_path)
    assert "no such file" in mistake(capsys, "--weights", tmp_path / "absent.pth")
    assert "unknown key" in mistake(capsys, "--weights", trained, "SOLVER.ABSENT", 1)
    assert "--score takes no value" in mistake(capsys, "--weights", trained, "--score", "a:b")
    empty = ["--weights", trained, "DATASETS.TRAIN", "[]"]
    assert "DATASETS.TRAIN is empty" in mistake(capsys, *empty)


def test_what_cannot_be_written_shows_first(models, tmp_path, capsys, monkeypatch):
    """And the other file is not there either."""
    (tmp_path / "file").write_text("")
    files = ["--json", tmp_path / "a.json", "--html", tmp_path / "file" / "page.html"]
    assert "--html" in mistake(capsys, f"{models}:shared", *files) and not (tmp_path / "a.json").exists()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    message = mistake(capsys, f"{models}:shared", "--html", tmp_path / "page.html")
    assert "pip install matplotlib" in message and not (tmp_path / "page.html").exists()


def test_errors_of_the_model_keep_their_traceback(models, tmp_path):
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(f"{models}:failing", "--json", tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()
    (tmp_path / f"{models}_broken.py").write_text("import absent_package")
    with pytest.raises(ModuleNotFoundError, match="absent_package"):
        run(f"{models}_broken:model")


def test_one_command_for_all(models, capsys):
    assert domainnorm(["audit", f"{models}:healthy"]) == 0
    assert "healthy" in capsys.readouterr().out
    assert domainnorm(["audit"]) == 2


@pytest.mark.slow
def test_as_a_process(models, tmp_path):
    command = [sys.executable, TOOL, f"{models}:shared", "--strict", "--json", "audit.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (1, "")
    assert "norm is called 2 times" in done.stdout and json.loads((tmp_path / "audit.json").read_text())
    done = subprocess.run([*command[:2], "absent:x"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def test_leak_exact_and_the_score_of_a_function(models, tmp_path, monkeypatch):
    given, real = {}, command.audit

    def audit(model, batches, *, leak=False, exact=False, score=None, thresholds=None):
        given.update(leak=leak, exact=exact, score=score(model) if score else None)
        return real(model, batches, thresholds=thresholds)

    monkeypatch.setattr(command, "audit", audit)
    (tmp_path / "scores.py").write_text("def score(model):\n    return float(model.norm.num_features)\n")
    assert run(f"{models}:shared", "--leak", "--score", "scores.py:score") == 0
    assert given == {"leak": True, "exact": False, "score": 4.0}
    assert run(f"{models}:shared", "--exact") == 0
    assert given == {"leak": False, "exact": True, "score": None}


def test_the_score_of_a_config_is_ap(trained, data_set, tmp_path, monkeypatch, capsys):
    found, real = [], engine_audit.audit

    def audit(model, batches, *, score=None, **others):
        found.append(score(model))
        return real(model, batches, **others)

    monkeypatch.setattr(engine_audit, "audit", audit)
    options = ["DATASETS.TEST", f"[{data_set}]", "--number", 4]
    assert run("--weights", trained, *options, "--score") == 0
    weights = ["MODEL.WEIGHTS", str(trained / "model_final.pth"), "DATASETS.TEST", [data_set]]
    cfg = dn.load_config(trained / "config.yaml", [*weights, "OUTPUT_DIR", str(tmp_path / "out")])
    expected = dn.evaluate(cfg, dn.build_model(cfg).eval(), "population")["population"]["bbox"]["AP"]
    assert found == [expected] and not (trained / "results.json").exists()
    capsys.readouterr()
    assert "DATASETS.TEST is empty" in mistake(capsys, "--weights", trained, "--score")
