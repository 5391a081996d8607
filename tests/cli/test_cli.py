"""tools/train_net.py: what it does, and one line and exit code 2 for a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from domainnorm.cli import main as domainnorm
from domainnorm.cli import train as train_net
from domainnorm.config import save_config

TOOL = Path(__file__).parents[2] / "tools" / "train_net.py"


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def config_file(data_set, tmp_path):
    file = tmp_path / "config.yaml"
    save_config(tiny.config(data_set, tmp_path / "out"), file)
    return str(file)


def run(*argv):
    return train_net.main([str(word) for word in argv])


def mistake(capsys, *argv):
    assert run(*argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_train_resume_and_evaluate(config_file, data_set, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--config-file", config_file, "SOLVER.MAX_ITER", 2) == 0
    assert (out / "model_final.pth").is_file() and not (out / "results.json").exists()
    assert run("--config-file", config_file, "--resume", "SOLVER.MAX_ITER", 2, "DATASETS.TEST", data_set) == 0
    assert (out / "results.json").is_file()
    statistics = ["TEST.STATISTICS", "[population, minibatch]"]
    (out / "results.json").unlink()
    evaluate = ["--config-file", config_file, "--eval-only", "DATASETS.TEST", data_set, *statistics]
    assert run(*evaluate, "--resume") == 0
    last = json.loads((out / "results.json").read_text())
    assert list(last) == ["population", "minibatch"]
    assert run(*evaluate, "MODEL.WEIGHTS", out / "model_final.pth", "OUTPUT_DIR", tmp_path / "other") == 0
    assert json.loads((tmp_path / "other" / "results.json").read_text()) == last
    assert capsys.readouterr().err == ""


def test_arguments_may_follow_the_options():
    args = train_net.parse(["--config-file", "F", "SEED", "1", "--num-gpus", "2", "MODEL.WEIGHTS", "", "--resume"])
    assert args.num_gpus == 2 and args.resume and args.opts == ["SEED", "1", "MODEL.WEIGHTS", ""]


def test_mistakes_on_the_command_line(config_file, tmp_path, capsys):
    assert "--config-file" in mistake(capsys)
    assert "--num-gpu" in mistake(capsys, "--config-file", config_file, "--num-gpu", 2)
    assert "SOLVER.MAX_ITERS" in mistake(capsys, "--config-file", config_file, "SOLVER.MAX_ITERS", 2)
    assert "pairs" in mistake(capsys, "--config-file", config_file, "SOLVER.MAX_ITER")
    assert "no such file" in mistake(capsys, "--config-file", tmp_path / "absent.yaml")
    assert "--num-gpus" in mistake(capsys, "--config-file", config_file, "--num-gpus", 0)
    assert "--machine-rank" in mistake(capsys, "--config-file", config_file, "--machine-rank", 1)
    assert not (tmp_path / "out").exists()


def test_mistakes_in_what_to_evaluate(config_file, data_set, tmp_path, capsys):
    evaluate = ["--config-file", config_file, "--eval-only", "DATASETS.TEST", data_set]
    assert "MODEL.WEIGHTS is empty" in mistake(capsys, *evaluate)
    assert "holds no checkpoint" in mistake(capsys, *evaluate, "--resume")
    assert "no such file" in mistake(capsys, *evaluate, "MODEL.WEIGHTS", tmp_path / "absent.pth")
    torch.save({"backbone.body.other": torch.zeros(1)}, tmp_path / "other.pth")
    message = mistake(capsys, *evaluate, "MODEL.WEIGHTS", tmp_path / "other.pth")
    assert "missing" in message and "unexpected backbone.body.other" in message and "more" in message


def test_one_command_for_all(config_file, capsys):
    assert domainnorm(["explain", "SOLVER.BASE_LR"]) == 0
    assert "SOLVER.BASE_LR" in capsys.readouterr().out
    assert domainnorm(["train", "--config-file", config_file, "SOLVER.MAX_ITERS", "2"]) == 2
    assert "SOLVER.MAX_ITER" in capsys.readouterr().err
    assert domainnorm(["eval", "--config-file", config_file]) == 2
    assert "--eval-only: MODEL.WEIGHTS is empty" in capsys.readouterr().err
    assert domainnorm(["export"]) == 2 and "--config-file" in capsys.readouterr().err
    assert domainnorm(["--help"]) == 0 and "train,eval,predict,compare,export,explain" in capsys.readouterr().out
    for wrong in ([], ["trian"]):
        assert domainnorm(wrong) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: expected a command of ['train', 'eval', 'predict', 'compare', 'export', ")


def test_other_errors_keep_their_traceback(config_file, monkeypatch):
    monkeypatch.setattr(train_net, "train", lambda cfg, resume: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--config-file", config_file)


def tool(*argv, launcher=(sys.executable,)):
    return subprocess.run([*launcher, TOOL, *map(str, argv)], capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_exit_code_and_one_line_of_a_process(config_file):
    done = tool("--config-file", config_file, "SOLVER.BASE_LT", 1)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "SOLVER.BASE_LR" in done.stderr


@pytest.mark.slow
def test_two_processes_and_a_loss_that_is_not_finite(config_file, data_set, tmp_path):
    done = tool("--config-file", config_file, "--num-gpus", 2, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", data_set)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("statistics ") == 1  # one table, not one a rank
    assert "population" in json.loads((tmp_path / "out" / "results.json").read_text())

    other = ["SOLVER.BASE_LR", 1e30, "SOLVER.CHECKPOINT_PERIOD", 9, "OUTPUT_DIR", tmp_path / "other"]
    done = tool("--config-file", config_file, "--num-gpus", 2, *other)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: the loss is not finite at iteration")


@pytest.fixture
def mask_rcnn_file(data_set, tmp_path):
    file = tmp_path / "mask_rcnn.yaml"
    choices = tiny.MASK_RCNN | {"MODEL__ROI_HEADS__SHUFFLE": True, "SOLVER__MAX_ITER": 2, "SOLVER__IMS_PER_BATCH": 8}
    save_config(tiny.config(data_set, tmp_path / "out", DATASETS__TEST=[data_set], **choices), file)
    return str(file)


TORCHRUN_2 = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "launcher"), [(8, None), (2, TORCHRUN_2)])
def test_mask_rcnn_with_shuffled_rois(mask_rcnn_file, data_set, tmp_path, processes, launcher):
    """Training, checkpoint and evaluation; then one process with the checkpoint predicts the same."""
    if launcher:
        done = tool("--config-file", mask_rcnn_file, launcher=launcher)
    else:
        done = tool("--config-file", mask_rcnn_file, "--num-gpus", processes)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["population"].keys() == {"bbox", "segm"}
    checkpoint = torch.load(tmp_path / "out" / "model_final.pth")
    assert int(checkpoint["model"]["roi_heads.box_shuffle.step"]) == 2
    key = "roi_heads.box_head.0.1.running_mean"  # of a layer per process: each its own, and merged
    assert len({tuple(of_rank["buffers"][key].tolist()) for of_rank in checkpoint["ranks"]}) == processes
    mean = sum(of_rank["buffers"][key] for of_rank in checkpoint["ranks"]) / processes
    torch.testing.assert_close(checkpoint["model"][key], mean)

    weights = ["MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth", "OUTPUT_DIR", tmp_path / "one"]
    assert run("--config-file", mask_rcnn_file, "--eval-only", *weights, "MODEL.ROI_HEADS.SHUFFLE", False) == 0
    found = [
        json.loads((tmp_path / folder / "inference/population/coco_instances_results.json").read_text())
        for folder in ("out", "one")
    ]
    assert found[0] == found[1] and len(found[0]) > 8 and {"bbox", "segmentation"} <= found[0][0].keys()


@pytest.mark.slow
def test_torchrun(config_file, data_set, tmp_path):
    """The same weights as from two processes that --num-gpus starts."""
    done = tool("--config-file", config_file, "SOLVER.MAX_ITER", 2, launcher=TORCHRUN_2)
    assert done.returncode == 0, done.stderr
    own = tool("--config-file", config_file, "SOLVER.MAX_ITER", 2, "--num-gpus", 2, "OUTPUT_DIR", tmp_path / "own")
    assert own.returncode == 0, own.stderr
    models = [torch.load(folder / "model_final.pth")["model"] for folder in (tmp_path / "out", tmp_path / "own")]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_weights_that_are_evaluated_as_another_model(config_file, data_set, tmp_path, capsys):
    """A shared-trained model may be evaluated per domain; but not without a word."""
    key = "MODEL.RETINANET.POPULATION_STATISTICS"
    assert run("--config-file", config_file, "SOLVER.MAX_ITER", 1, key, "shared") == 0
    weights = ["MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth", "OUTPUT_DIR", tmp_path / "other"]
    evaluate = ["--config-file", config_file, "--eval-only", "DATASETS.TEST", data_set, *weights]
    for choice, said in (("per_domain", True), ("shared", False)):
        capsys.readouterr()
        assert run(*evaluate, key, choice) == 0
        assert (
            f"was trained with another model: {key} 'shared' (here: 'per_domain')" in capsys.readouterr().out
        ) == said


def test_weights_with_nan_are_refused(config_file, data_set, tmp_path, capsys):
    assert run("--config-file", config_file, "SOLVER.MAX_ITER", 1) == 0
    content = torch.load(tmp_path / "out" / "model_final.pth")
    content["model"]["backbone.fpn.inner_blocks.0.0.bias"][3] = float("nan")
    torch.save(content, tmp_path / "nan.pth")
    evaluate = ["--config-file", config_file, "--eval-only", "DATASETS.TEST", data_set]
    capsys.readouterr()
    message = mistake(capsys, *evaluate, "MODEL.WEIGHTS", tmp_path / "nan.pth", "OUTPUT_DIR", tmp_path / "other")
    assert "nan.pth: weights that are not finite: backbone.fpn.inner_blocks.0.0.bias (1 of 8 numbers)" in message
