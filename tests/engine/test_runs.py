"""A run among others: its folder is its own, signals save it, it goes on where it was, and its log is complete."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks

from domainnorm.config import UserError, load_config, save_config
from domainnorm.engine import train
from domainnorm.engine.checkpoint import checkpoint_period, last_checkpoint, remove_older
from domainnorm.engine.folder import RunFolder
from domainnorm.engine.log import logged_end, setup_logging
from domainnorm.engine.streams import tolerant_streams
from domainnorm.errors import Stopped
from domainnorm.modeling.checkpoint_file import read_checkpoint
from domainnorm.output import remove_leftovers, replace_file

ROOT = Path(__file__).parents[2]
train_module = sys.modules["domainnorm.engine.train"]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def small_model(monkeypatch):
    monkeypatch.setattr(train_module, "build_model", lambda cfg: tiny.Regressor(norm=True))


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


# --- the folder -----------------------------------------------------------------------------------------------------


def test_a_new_run_does_not_destroy_an_earlier_one(data_set, tmp_path, small_model):
    cfg = tiny.config(data_set, tmp_path / "out")
    train(cfg)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    with pytest.raises(UserError, match=r"holds an earlier run \(model_final\.pth\): add --resume to go on with it"):
        train(cfg)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before
    train(cfg, resume=True)


def test_a_run_that_saved_nothing_may_be_started_again(data_set, tmp_path, monkeypatch):
    class Fails(tiny.Regressor):
        def forward(self, images, targets=None):
            raise ZeroDivisionError

    monkeypatch.setattr(train_module, "build_model", lambda cfg: Fails())
    cfg = tiny.config(data_set, tmp_path, SOLVER__MAX_ITER=1)
    with pytest.raises(ZeroDivisionError):
        train(cfg)
    assert "ZeroDivisionError" in (tmp_path / "log.txt").read_text()
    monkeypatch.setattr(train_module, "build_model", lambda cfg: tiny.Regressor())
    train(cfg)


LOCKED = """
import sys, time
from domainnorm.engine.folder import RunFolder
with RunFolder(sys.argv[1]) as folder:
    folder.open()
    print("locked", flush=True)
    time.sleep(100)
"""


def test_two_runs_in_one_folder(data_set, tmp_path, small_model):
    """The second is told of the first; one that was killed blocks nobody."""
    words = [sys.executable, "-c", LOCKED, str(tmp_path)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    for resume in (False, True):
        with pytest.raises(UserError, match=rf"is in use by another run \(process {process.pid} on .*, since 2"):
            train(tiny.config(data_set, tmp_path), resume=resume)
    process.kill()
    process.wait()
    assert (tmp_path / ".lock").exists()
    train(tiny.config(data_set, tmp_path))
    assert not (tmp_path / ".lock").exists()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("content")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "precious")
    with RunFolder(str(tmp_path / "out")) as folder, pytest.raises(UserError, match="cannot be locked"):
        folder.open()
    assert (tmp_path / "precious").read_text() == "content"


def test_temporary_files_have_names_of_their_own(tmp_path):
    names = set()
    for _ in range(2):
        with replace_file(tmp_path / "a"), replace_file(tmp_path / "a"):
            names |= {path.name for path in tmp_path.iterdir()}
    assert len(names - {"a"}) == 4
    (tmp_path / ".0123456789abcdef.tmp").write_text("of a writer that was killed")
    (tmp_path / ".mine.tmp").write_text("")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".mine.tmp"}


def test_a_replaced_file_has_the_permissions_of_a_new_one(tmp_path):
    (tmp_path / "new").touch()
    with replace_file(tmp_path / "a"):
        pass
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "new").stat().st_mode


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_the_period_suits_the_length_of_the_run():
    def period(*words):
        return checkpoint_period(load_config(None, list(words)))

    assert period("SOLVER.MAX_ITER", 90000) == 5000 and period("SOLVER.MAX_ITER", 300) == 30
    assert period("SOLVER.MAX_ITER", 4) == 1
    assert period("SOLVER.MAX_ITER", 300, "SOLVER.CHECKPOINT_PERIOD", 7) == 7


def test_the_last_checkpoints_stay(data_set, tmp_path, small_model):
    choices = {"SOLVER__MAX_ITER": 6, "SOLVER__CHECKPOINT_PERIOD": 1}
    for keep, left in ((2, [4, 5]), (0, [1, 2, 3, 4, 5])):
        folder = tmp_path / str(keep)
        train(tiny.config(data_set, folder, SOLVER__CHECKPOINT_KEEP=keep, **choices))
        names = sorted(path.name for path in folder.glob("*.pth"))
        assert names == [f"model_{number:07d}.pth" for number in left] + ["model_final.pth"]
    (tmp_path / "0" / "model_1.pth").touch()  # not one of the run's
    remove_older(tmp_path / "0", 4, 1)  # as in a run that went back to 4
    assert sorted(path.name for path in (tmp_path / "0").glob("*.pth")) == [
        *("model_0000004.pth", "model_0000005.pth", "model_1.pth", "model_final.pth")
    ]


def scores(monkeypatch, values):
    """Evaluation gives these, by the iteration; each has a list of those it was asked for."""
    asked = []

    def evaluate(cfg, model, **options):
        asked.append(next(value for value in values))
        return {"population": {"bbox": {"AP": asked[-1], "AP50": 1.0}}}

    monkeypatch.setattr(train_module, "evaluate", evaluate)
    return asked


def test_the_best_model_stays(data_set, tmp_path, small_model, monkeypatch):
    asked = scores(monkeypatch, iter([10.0, float("nan"), 30.0, 20.0]))
    cfg = tiny.config(data_set, tmp_path, DATASETS__TEST=[data_set], TEST__EVAL_PERIOD=1)
    train(cfg)
    assert len(asked) == 4
    best, third = (read_checkpoint(tmp_path / f"model_{name}.pth")["model"] for name in ("best", "0000003"))
    assert all(torch.equal(value, third[key]) for key, value in best.items())


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_that_was_killed_is_made_up_for(data_set, tmp_path, small_model, monkeypatch):
    cfg = tiny.config(data_set, tmp_path, DATASETS__TEST=[data_set], TEST__EVAL_PERIOD=2)

    def killed(cfg, model, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(train_module, "evaluate", killed)
    for at in (2, 4):
        with pytest.raises(ZeroDivisionError):
            train(cfg, resume=at == 4)
        asked = scores(monkeypatch, iter([10.0, 20.0]))
        if at == 2:
            monkeypatch.setattr(train_module, "evaluate", lambda cfg, model, **options: killed(cfg, model))
    train(cfg, resume=True)
    assert [line["iteration"] for line in metrics_of(tmp_path) if "population/bbox/AP" in line] == [2, 4]
    assert asked == [10.0, 20.0]
    before = metrics_of(tmp_path)
    train(cfg, resume=True)  # finished: nothing is done again
    assert asked == [10.0, 20.0] and metrics_of(tmp_path) == before
    assert "iteration 4 is evaluated already" in (tmp_path / "log.txt").read_text()


# --- another number of processes ------------------------------------------------------------------------------------


def _train_here(_, cfg, resume):
    train_module.build_model = lambda cfg: tiny.Regressor()
    train(cfg, resume=resume)


def test_another_number_of_processes_goes_on_to_the_step(data_set, tmp_path, monkeypatch):
    """Without randomness in the model it arrives where one process does, but for rounding."""
    monkeypatch.setattr(train_module, "build_model", lambda cfg: tiny.Regressor())
    choices = {"SOLVER__BASE_LR": 0.1, "DATALOADER__ASPECT_RATIO_GROUPING": False}
    train(tiny.config(data_set, tmp_path / "a", **choices))
    half, whole = (tiny.config(data_set, tmp_path / "b", SOLVER__MAX_ITER=n, **choices) for n in (2, 4))
    run_ranks(_train_here, 2, half, False)
    train(whole, resume=True)
    assert "not to the bit" in (tmp_path / "b" / "log.txt").read_text()
    a, b = (read_checkpoint(tmp_path / name / "model_final.pth") for name in "ab")
    assert b["iteration"] == 4 and len(b["ranks"]) == 1
    for name, value in a["model"].items():
        torch.testing.assert_close(b["model"][name], value, rtol=1e-12, atol=1e-14)


# --- signals --------------------------------------------------------------------------------------------------------


def test_a_signal_finishes_the_step_and_saves(data_set, tmp_path, monkeypatch, capsys):
    class Signalled(tiny.Regressor):
        calls = 0

        def forward(self, images, targets=None):
            self.calls += 1
            if self.calls == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(images, targets)

    monkeypatch.setattr(train_module, "build_model", lambda cfg: Signalled(norm=True))
    before = signal.getsignal(signal.SIGTERM)
    cfg = tiny.config(data_set, tmp_path / "a", SOLVER__CHECKPOINT_PERIOD=9)
    with pytest.raises(Stopped) as stopped:
        train(cfg)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert last_checkpoint(tmp_path / "a").name == "model_0000003.pth"
    for text in (capsys.readouterr().out, (tmp_path / "a" / "log.txt").read_text()):
        assert "stopped at 3; go on with --resume" in text
    monkeypatch.setattr(train_module, "build_model", lambda cfg: tiny.Regressor(norm=True))
    train(cfg, resume=True)
    train(tiny.config(data_set, tmp_path / "b", SOLVER__CHECKPOINT_PERIOD=9))
    a, b = (read_checkpoint(tmp_path / name / "model_final.pth") for name in "ab")
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())


def test_a_signal_in_an_evaluation_ends_it_at_once(data_set, tmp_path, small_model, monkeypatch):
    def evaluate(cfg, model, **options):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(train_module, "evaluate", evaluate)
    cfg = tiny.config(data_set, tmp_path, DATASETS__TEST=[data_set], TEST__EVAL_PERIOD=3)
    began = time.monotonic()
    with pytest.raises(Stopped):
        train(cfg)
    assert time.monotonic() - began < 30 and last_checkpoint(tmp_path).name == "model_0000003.pth"


# --- what cannot be written -----------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_harms_nothing(data_set, tmp_path, monkeypatch):
    """Here a file may not be as large as a checkpoint."""
    monkeypatch.setattr(train_module, "build_model", lambda cfg: tiny.Regressor(norm=True))
    cfg = tiny.config(data_set, tmp_path, SOLVER__MAX_ITER=2)
    train(cfg)
    before = (tmp_path / "model_final.pth").read_bytes()
    longer = tiny.config(data_set, tmp_path, SOLVER__MAX_ITER=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        with pytest.raises(UserError, match=r"model_final\.pth: cannot be written: File too large; what was there"):
            train(longer, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    train(longer, resume=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
def test_a_device_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="pipe is a device or a pipe, which cannot be replaced"), replace_file(pipe):
        raise AssertionError
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_a_log_that_cannot_be_written_is_one_line(data_set, tmp_path, small_model, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"log\.txt: cannot be written: No space left on device"):
        train(tiny.config(data_set, tmp_path))
    assert "Traceback" not in capsys.readouterr().err


def test_streams_whose_reader_is_gone_or_has_no_such_letters(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with tolerant_streams():
            print("x" * 100, flush=True)
            print("and on", flush=True)
    reader, writer = os.pipe()
    with open(writer, "w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", None)
        with tolerant_streams():
            print("\xd7", flush=True)
            print("nowhere", file=sys.stderr)
    assert os.read(reader, 100) == b"\\xd7\n"
    os.close(reader)


# --- the log --------------------------------------------------------------------------------------------------------


def test_the_log_is_complete(data_set, tmp_path, monkeypatch):
    class Warns(tiny.Regressor):
        def forward(self, images, targets=None):
            warnings.warn("what a library says", UserWarning, stacklevel=1)
            return super().forward(images, targets)

    monkeypatch.setattr(train_module, "build_model", lambda cfg: Warns())
    train(tiny.config(data_set, tmp_path, DATASETS__TEST=[data_set], SOLVER__MAX_ITER=1))
    text = (tmp_path / "log.txt").read_text()
    for word in (
        "command: ",
        f"torch {torch.__version__}",
        "torchvision",
        "Python 3",
        "domainnorm 0",
        "cpu (",
        data_set,
    ):
        assert word in text, word
    assert "weights: random" in text and "what a library says" in text
    assert re.search(r"^statistics +AP +AP50", text, re.M) and re.search(r"^population +[\d-]", text, re.M)
    with pytest.raises(UserError):
        train(tiny.config(data_set, tmp_path, DATASETS__TEST=[data_set], SOLVER__MAX_ITER=1, SEED=1), resume=True)


def test_the_error_that_ended_it_is_in_the_log(tmp_path):
    for error in (UserError("what the user did"), ZeroDivisionError("what we did")):
        with pytest.raises(type(error)), logged_end():
            setup_logging(tmp_path)
            raise error
    text = (tmp_path / "log.txt").read_text()
    assert "ERROR what the user did" in text and "ZeroDivisionError: what we did" in text


@pytest.mark.slow
def test_signals_of_real_processes(data_set, tmp_path):
    """Ctrl-C of a terminal reaches every process of the group, those that load data, too."""
    choices = {"SOLVER__MAX_ITER": 10000, "DATALOADER__NUM_WORKERS": 1, "SOLVER__CHECKPOINT_PERIOD": 9999}
    save_config(tiny.config(data_set, tmp_path / "out", **choices), tmp_path / "config.yaml")
    for number, processes in ((signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGTERM, 2)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        words = [ROOT / "tools" / "train_net.py", "--config-file", tmp_path / "config.yaml", "--num-gpus", processes]
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        timer = threading.Timer(120, process.kill)
        timer.start()
        seen = []
        for line in process.stdout:
            seen.append(line)
            if "iteration 20/" in line:
                os.killpg(process.pid, number)
                break
        seen += process.stdout.readlines()
        timer.cancel()
        assert process.wait(60) == 128 + number, seen
        (line,) = (line for line in seen if "stopped at" in line)
        done = int(re.search(r"stopped at (\d+); go on with --resume", line)[1])
        assert read_checkpoint(last_checkpoint(tmp_path / "out"))["iteration"] == done
        assert "Traceback" not in "".join(seen)


# --- what is wrong shows before the first step ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"SOLVER__IMS_PER_BATCH": 1}, r"INPUT\.MIN_SIZE_TRAIN 64: .* SOLVER\.IMS_PER_BATCH 1 over"),
        ({"SOLVER__ACCUMULATE": 4}, r"INPUT\.MIN_SIZE_TRAIN 64: .* SOLVER\.ACCUMULATE 4"),
        (
            {"SOLVER__IMS_PER_BATCH": 1, "MODEL__BACKBONE__NORM": "GN"},
            r"coarsest features are 1 x 1: MODEL\.RETINANET\.NORM 'BN' has one value",
        ),
        ({"MODEL__RETINANET__NUM_CLASSES": 1}, r"MODEL\.RETINANET\.NUM_CLASSES 1 contradicts"),
        (
            {"MODEL__NORM_DOMAINS": "dataset", "DATASETS__DOMAINS": ["a"], "DATASETS__TEST_DOMAINS": [""]},
            r"DATASETS\.TEST_DOMAINS",
        ),
    ],
)
def test_what_is_wrong_shows_before_anything_is_written(data_set, tmp_path, choices, message):
    with pytest.raises(UserError, match=message):
        train(tiny.config(data_set, tmp_path / "out", DATASETS__TEST=[data_set], **choices))
    assert not (tmp_path / "out").exists()


def test_one_image_of_a_domain_is_warned_of_and_one_line(data_set, tmp_path, caplog):
    """Whether a batch of two domains has one image of one of them shows when it comes."""
    domains = {"MODEL__NORM_DOMAINS": "dataset", "DATASETS__TRAIN": [data_set] * 2, "DATASETS__DOMAINS": ["a", "b"]}
    keys = domains | {"MODEL__RETINANET__NORM_DOMAINS": "level_and_dataset"}
    keys |= {"SOLVER__IMS_PER_BATCH": 2, "DATALOADER__RATIOS": [1, 1]}
    cfg = tiny.config(data_set, tmp_path / "out", **keys)
    with pytest.raises(UserError, match=r"features of a batch are too small: .*; here: raise INPUT\.MIN_SIZE_TRAIN"):
        train(cfg)
    assert any(record.levelname == "WARNING" and "one image of a domain" in record.message for record in caplog.records)


def test_a_class_that_only_the_test_set_has(data_set, tmp_path):
    content = json.loads(Path(data_set.split(":")[0]).read_text())
    content["categories"].append({"id": 9, "name": "other"})
    (tmp_path / "test.json").write_text(json.dumps(content))
    test_set = f"{tmp_path / 'test.json'}:{data_set.split(':')[1]}"
    with pytest.raises(UserError, match=r"categories|NUM_CLASSES"):
        cfg = tiny.config(data_set, tmp_path / "out", DATASETS__TEST=[test_set], MODEL__RETINANET__NUM_CLASSES=2)
        train(cfg)
    assert not (tmp_path / "out").exists()
