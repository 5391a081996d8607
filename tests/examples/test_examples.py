"""The examples run, and do what they say."""

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import domainnorm as dn
from domainnorm.cli import train
from domainnorm.config import load_config
from domainnorm.data import shapes

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_attack_stays_near_and_finds_a_larger_loss():
    attacked = example("adversarial_training").attacked
    model = nn.Sequential(nn.Conv2d(3, 4, 3), dn.BatchGroupNorm(4, num_groups=2), nn.Flatten(), nn.Linear(4 * 36, 3))
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 3
    model.train()(images)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    moved = attacked(model, images, labels, 5)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (moved - images).abs().max() <= 8 / 255 + 1e-6 and moved.min() >= 0 and moved.max() <= 1
    loss = nn.CrossEntropyLoss(reduction="none")
    model.eval()
    assert (loss(model(moved), labels) > loss(model(images), labels)).all()


@pytest.mark.slow
def test_adversarial_training():
    found = example("adversarial_training").main(["--steps", "60", "--images", "400", "--attack", "2"])
    assert found["clean"] > 30 and found["attacked"] <= found["clean"]


@pytest.mark.parametrize("norm", ["BGN", "BN"])
def test_few_shots(norm):
    few_shots = example("prototypical_network")
    options = ["--norm", norm, "--ways", "3", "--noise", "0.5", "--tests", "30"]
    trained = few_shots.main([*options, "--episodes", "40"])
    assert min(trained.values()) > 60  # of 33.3 by chance


def test_classes_of_waves_are_the_same_in_every_image():
    waves, generator = example("prototypical_network").waves, torch.Generator().manual_seed(0)
    images = waves(torch.tensor([3, 7]), 4, 0.0, generator)
    spectra = torch.fft.fft2(images).abs()
    assert torch.allclose(spectra[:, 0], spectra[:, 1], rtol=0.3, atol=30)
    assert not torch.allclose(spectra[0, 0], spectra[1, 0], rtol=0.3, atol=30)


@pytest.mark.slow
def test_own_model(tmp_path, capsys):
    found = example("own_model").main(["--iterations", "2", "--out", str(tmp_path / "out")])
    assert found.keys() == {"population", "minibatch"} and all(0 <= value <= 100 for value in found.values())
    assert "training 1" in capsys.readouterr().out
    assert "norm_of_class_weights" in (tmp_path / "out" / "metrics.json").read_text()


@pytest.mark.slow
def test_audit_foreign_model(tmp_path, capsys):
    found = example("audit_foreign_model").main(["--steps", "2", "--out", str(tmp_path / "out")])
    assert found.keys() == {"before", "after"} and all(0 <= value <= 100 for value in found.values())
    assert "with population statistics of each level" in capsys.readouterr().out


@pytest.mark.slow
def test_adapt_domain(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DOMAINNORM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(shapes, "COUNTS", {"train": 8, "val": 4})
    run = ["SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 0, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "run")]
    dn.train(dn.load_config(str(EXAMPLES.parent / "configs" / "quickstart.yaml"), run))
    found = example("adapt_domain").main([str(tmp_path / "run"), "--images", "3", "--out", str(tmp_path / "out")])
    assert found.keys() == {"minibatch", "source", "target", "nearest"}
    assert all(set(scores) == {"shapes_val", "shapes_night_val"} for scores in found.values())
    assert "the image itself" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text()).keys() == found.keys()


def test_level_statistics(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("DOMAINNORM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(shapes, "COUNTS", {"train": 8, "val": 2})
    run, level_statistics = tmp_path / "run", example("level_statistics")
    cfg = dn.load_config(str(EXAMPLES.parent / "configs" / "quickstart.yaml"), ["MODEL.DEVICE", "cpu"])
    run.mkdir()
    (run / "config.yaml").write_text(cfg.dump())
    torch.save({"model": dn.build_model(cfg).state_dict()}, run / "model_final.pth")
    levels = level_statistics.level_features(run, "classification_head.conv.1.1", images=2)
    assert [level.shape[0] for level in levels] == [64] * 5
    assert [level.shape[1] for level in levels[:2]] == [2 * 16 * 20, 2 * 8 * 10]
    shifted = [torch.randn(4, 1000) * (1 + k) + k for k in range(3)]
    lines = level_statistics.draw(shifted).axes[1].get_lines()
    heights = [line.get_ydata()[0] for line in lines if (line.get_color(), line.get_marker()) == ("C2", "o")]
    together = torch.cat(shifted, 1)
    expected = ((2 - together.mean(1)) / together.std(1)).abs().mean()
    assert heights == [pytest.approx(float(expected), abs=0.1)]
    level_statistics.main([str(run), "--images", "1", "--out", str(tmp_path / "levels.png")])
    assert (tmp_path / "levels.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match=r"--layer takes any of .*got 'conv'"):
        level_statistics.level_features(run, "conv", 1)


def test_a_head_that_knows_its_levels_is_the_same_with_the_same_statistics():
    audit_foreign_model = example("audit_foreign_model")
    torch.manual_seed(0)
    model, images = audit_foreign_model.fcos().eval(), [torch.rand(3, 128, 128), torch.rand(3, 100, 128)]
    with torch.no_grad():
        expected = model(images)
        model.head = audit_foreign_model.HeadOfLevels(model.head)
        found = model.eval()(images)
    for one, other in zip(found, expected, strict=True):
        for key, value in one.items():
            torch.testing.assert_close(value, other[key])


@pytest.mark.slow
def test_fcos_levels(tmp_path, capsys):
    found = example("fcos_levels").main(["--steps", "2", "--out", str(tmp_path / "out")])
    assert found.keys() == {"each level", "all levels"} and all(0 <= value <= 100 for value in found.values())
    assert "with population statistics of all levels" in capsys.readouterr().out


@pytest.mark.parametrize("affine", ["shared", "per_domain"])
def test_the_head_of_fcos_normalizes_each_level_by_itself(affine):
    torch.manual_seed(0)
    model = example("fcos_levels").fcos(affine)
    images = [torch.rand(3, 128, 160) for _ in range(2)]
    target = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 50.0]]), "labels": torch.tensor([1])}
    seen = []
    model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    losses = model(images, [target] * 2)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.head.parameters())
    (levels,) = seen
    for head in (model.head.classification_head, model.head.regression_head):
        norms = [layer for layer in head.modules() if isinstance(layer, dn.DomainBatchNorm)]
        first, norm = head.tower[0], norms[0]
        assert len(norms) == 2 and norm.running_mean.shape == (5, 64) and norm.num_batches_tracked.tolist() == [1] * 5
        assert norm.weight.shape == ((64,) if affine == "shared" else (5, 64))
        separate = [nn.BatchNorm2d(64).train() for _ in levels]
        with torch.no_grad():
            inputs = [first(level) for level in levels]
            for x, layer, y in zip(inputs, separate, norm(inputs), strict=True):
                torch.testing.assert_close(y, layer(x), atol=1e-5, rtol=1e-5)
    detections = model.eval()(images)
    assert len(detections) == 2 and {"boxes", "scores", "labels"} <= detections[0].keys()


def test_shared_statistics_of_fcos_are_those_of_the_union_of_levels():
    fcos_levels = example("fcos_levels")
    model = fcos_levels.fcos().eval()
    norm = model.head.classification_head.tower[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(1, 2)
    shared = fcos_levels.shared_statistics(model).head.classification_head.tower[1]
    assert type(shared) is nn.BatchNorm2d and norm.running_mean.shape == (5, 64)  # the model itself stays
    torch.testing.assert_close(shared.running_mean, norm.running_mean.mean(0))
    between = norm.running_mean.var(0, correction=0)
    torch.testing.assert_close(shared.running_var, norm.running_var.mean(0) + between)


def slurm(tmp_path, *args, status=0):
    """What `examples/slurm.sh` runs on each of two machines, its exit code, and its calls of scontrol."""
    log = tmp_path / "log"
    commands = {
        "scontrol": f'echo "scontrol $*" >> {log}; [ "$1" != show ] || printf "node7\\nnode8\\n"',
        "srun": f'for rank in 0 1; do SLURM_NODEID=$rank "$@"; done; exit {status}',
        "python": f'for word in machine "$@"; do echo "$word" >> {log}.$SLURM_NODEID; done',
    }
    for name, lines in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "90123", "SLURM_NNODES": "2"}
    environment = {**os.environ, **variables, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", str(EXAMPLES / "slurm.sh"), *args]
    code = subprocess.run(script, env=environment, check=False, timeout=30).returncode
    words = [(tmp_path / f"log.{rank}").read_text().splitlines()[1:] for rank in (0, 1)]
    return code, words, log.read_text().splitlines()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_slurm_starts_a_process_for_each_gpu_of_two_machines(tmp_path):
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm.sh")], check=True, timeout=30)
    code, machines, calls = slurm(tmp_path)
    assert code == 0 and calls == ["scontrol show hostnames node[7-8]"]
    for rank, (file, *words) in enumerate(machines):
        assert (EXAMPLES.parent / file).is_file()
        args = train.parse(words)
        assert (args.num_gpus, args.num_machines, args.machine_rank) == (8, 2, rank) and args.resume
        assert args.dist_url == "tcp://node7:20123"
        cfg = load_config(EXAMPLES.parent / args.config_file, args.opts)
        assert args.num_gpus * args.num_machines == cfg.SOLVER.IMS_PER_BATCH
    assert "#SBATCH --nodes=2" in (EXAMPLES / "slurm.sh").read_text()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(("status", "calls"), [(143, ["scontrol requeue 90123"]), (2, [])])
def test_slurm_goes_on_after_its_time_is_up_with_the_options_given(tmp_path, status, calls):
    code, machines, found = slurm(
        tmp_path, "configs/quickstart.yaml", "MODEL.DEVICE", "cpu", "DATASETS.TEST", "[a b, c]", status=status
    )
    assert code == status and found[1:] == calls
    args = train.parse(machines[1][1:])
    assert args.config_file == "configs/quickstart.yaml"
    assert args.opts == ["MODEL.DEVICE", "cpu", "DATASETS.TEST", "[a b, c]"]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))  # of the kernel, a process of its own
    notebook = nbformat.read(EXAMPLES / "first_look.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # it is stored without them
    client.NotebookClient(notebook, timeout=900, kernel_name="python3").execute(cwd=str(EXAMPLES))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert text.count("means of") == 5 and "shared statistics" not in text.split("repair:")[1]
    assert "has 5 domains in a forward pass" in text.split("repair:")[0]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
