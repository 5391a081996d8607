"""A checkpoint that was damaged, or made to do harm, loads as it was saved or is refused in one line."""

import copy
import os
import random

import pytest
import tiny
import torch
from torch import nn

from domainnorm.config import UserError
from domainnorm.engine import train
from domainnorm.engine.average import WeightAverage
from domainnorm.engine.checkpoint import (
    last_checkpoint,
    read_training,
    restore_training,
    save_checkpoint,
    save_training,
)
from domainnorm.engine.checkpoint_check import check_training
from domainnorm.engine.optim import build_optimizer
from domainnorm.modeling.checkpoint_file import read_checkpoint, state_dict_of, write_checkpoint
from domainnorm.modeling.weights import load_weights

OPTIMIZERS = ["AdamW", "Adam", "SGD", "RMSprop"]


def parts(cfg):
    """A model with its optimizer, loss scaler and average."""
    torch.manual_seed(1)
    model = tiny.Regressor(norm=True)
    return model, build_optimizer(cfg, model), torch.amp.GradScaler("cpu"), WeightAverage(cfg, model)


@pytest.fixture(params=OPTIMIZERS)
def saved(request, tmp_path):
    """The config and the file of a run of three steps."""
    choices = {"SOLVER__OPTIMIZER": request.param, "SOLVER__AVERAGE_WEIGHTS": "EMA"}
    cfg = tiny.config("a.json:images", tmp_path / "run", **choices)
    model, optimizer, scaler, average = parts(cfg)
    for iteration in range(3):
        scaler.scale(model(list(torch.rand(4, 3, 8, 8)), [{"boxes": torch.rand(2, 4)}] * 4)["loss_box"]).backward()
        scaler.step(optimizer)
        scaler.update()
        average.update(model, iteration)
    (tmp_path / "run").mkdir()
    save_training(cfg, "model_0000003.pth", model, optimizer, scaler, 3, average)
    return cfg, last_checkpoint(tmp_path / "run")


def resumed(cfg, file):
    """All that a run goes on with."""
    model, optimizer, scaler, average = parts(cfg)
    checkpoint = read_training(cfg, file)
    check_training(checkpoint, file, model, optimizer, scaler, average)
    restore_training(checkpoint, file, model, optimizer, scaler, average, seed=0)
    states = [model.state_dict(), optimizer.state_dict(), scaler.state_dict(), average.average.state_dict()]
    return copy.deepcopy([checkpoint["iteration"], *states, torch.get_rng_state(), random.getstate()])


def flat(tree):
    if isinstance(tree, torch.Tensor):
        return [(tree.dtype, tuple(tree.shape), tree.tolist())]
    if isinstance(tree, dict):
        return [pair for key in sorted(tree, key=str) for pair in (key, *flat(tree[key]))]
    return [leaf for item in tree for leaf in flat(item)] if isinstance(tree, (list, tuple)) else [tree]


def outcome(cfg, file):
    """What was resumed, or None where it was refused in one line."""
    try:
        return flat(resumed(cfg, file))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600, error
        return None


def test_every_byte_counts(saved):
    cfg, file = saved
    whole, expected = file.read_bytes(), outcome(cfg, file)
    assert expected is not None
    chance = random.Random(0)
    for place in sorted(chance.sample(range(len(whole)), 60)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << chance.randrange(8))]) + whole[place + 1 :])
        assert outcome(cfg, file) in (None, expected), place
    for size in [0, 1, *sorted(chance.sample(range(len(whole)), 20)), len(whole) - 1]:
        file.write_bytes(whole[:size])
        assert outcome(cfg, file) in (None, expected), size


def entries(tree, path=()):
    """The paths of all entries of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in items:
        yield (*path, key)
        if len(path) < 5:
            yield from entries(value, (*path, key))


def put(tree, path, value):
    """A copy with another value at `path`, or without it."""
    if not path:
        return value
    node = copy.copy(tree)
    if isinstance(node, tuple):
        return tuple(put(node[i], path[1:], value) if i == path[0] else item for i, item in enumerate(node))
    if len(path) == 1 and value is DELETED:
        del node[path[0]]
    else:
        node[path[0]] = put(node[path[0]], path[1:], value)
    return node


def get(tree, path):
    return get(tree[path[0]], path[1:]) if path else tree


DELETED = object()
WRONG = [DELETED, None, -1, float("nan"), "text", [], {}, {"a": 1}, torch.zeros(2), torch.zeros(7, 5, 3).long()]


def wrong_tensors(value):
    flattened = value.flatten()
    yield torch.cat([flattened, flattened])  # of another shape
    yield flattened[:0]
    yield value.to(torch.float16 if value.is_floating_point() else torch.float32)  # of another type
    yield value.to(torch.complex64)
    yield value.to("meta")
    yield torch.zeros(1).expand(value.shape if value.dim() else (3,))  # one number in the place of all
    if value.dim() == 2:
        yield value.to_sparse()
    if value.is_floating_point():
        yield torch.full_like(value, float("nan"))
        yield torch.full_like(value, float("inf"))


@pytest.mark.slow
def test_every_entry_is_checked(saved):
    """Each is left out, or has another type, shape, dtype or layout."""
    cfg, file = saved
    content, expected = read_checkpoint(file), outcome(cfg, file)
    chance = random.Random(1)
    paths = [p for p in entries(content) if len(p) < 4 or "python" not in p]
    refused = tried = 0
    for path in paths:
        value = get(content, path)
        tensor = isinstance(value, torch.Tensor)
        for wrong in [*chance.sample(WRONG, 1), *(wrong_tensors(value) if tensor else ())]:
            if tensor and isinstance(wrong, torch.Tensor) and (wrong.shape, wrong.dtype) == (value.shape, value.dtype):
                must = wrong.device.type == "meta" or wrong.layout != torch.strided or not wrong.isfinite().all()
            else:
                must = path[0] in ("model", "average", "scaler") or path[:2] == ("optimizer", "state")
            if wrong is DELETED and isinstance(get(content, path[:-1]), tuple):
                continue
            torch.save(put(content, path, wrong), file)
            found = outcome(cfg, file)
            tried, refused = tried + 1, refused + (found is None)
            if must and path != ("scaler",) and not (path[:2] == ("optimizer", "state") and wrong in ([DELETED], [{}])):
                allowed = path[:2] == ("optimizer", "state") and len(path) == 3 and (wrong is DELETED or wrong == {})
                allowed |= path == ("optimizer", "state") and isinstance(wrong, dict) and not wrong
                assert found is None or allowed or found == expected, (path, wrong)
    assert tried > 200 and refused > 200


def test_an_optimizer_of_another_kind_is_refused(saved):
    cfg, file = saved
    content = read_checkpoint(file)
    for name in OPTIMIZERS:
        other = cfg.clone()
        other.defrost()
        other.SOLVER.OPTIMIZER = name
        model, optimizer, scaler, average = parts(other)
        if content["optimizer"]["state"][0].keys() != _kept(name):
            with pytest.raises(UserError, match="optimizer state of parameter 0: holds"):
                check_training(content, file, model, optimizer, scaler, average)


def _kept(name):
    return {
        "SGD": {"momentum_buffer"},
        "RMSprop": {"step", "square_avg", "momentum_buffer"},
    }.get(name, {"step", "exp_avg", "exp_avg_sq"})


def test_a_state_in_another_memory_format_means_the_same(tmp_path):
    """A fused optimizer would take its numbers in the order of memory."""
    cfg = tiny.config("a.json:images", tmp_path, SOLVER__OPTIMIZER="AdamW")

    def step(model, optimizer):
        model.weight.grad = torch.arange(model.weight.numel()).float().view_as(model.weight)
        optimizer.step()

    def start():
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 2, bias=False)
        return model, build_optimizer(cfg, model), torch.amp.GradScaler(enabled=False)

    model, optimizer, scaler = start()
    step(model, optimizer)
    save_training(cfg, "a.pth", model, optimizer, scaler, 1)
    content = read_checkpoint(tmp_path / "a.pth")
    for name in ("exp_avg", "exp_avg_sq"):
        value = content["optimizer"]["state"][0][name]
        content["optimizer"]["state"][0][name] = value.contiguous(memory_format=torch.channels_last)
    other, its_optimizer, _ = start()
    restore_training(content, "a.pth", other, its_optimizer, scaler, seed=0)
    step(model, optimizer), step(other, its_optimizer)
    assert torch.equal(model.weight, other.weight)


POINTERS = [
    b"",
    b"\n",
    b"../a.pth",
    b"/etc/passwd",
    b"a.pth\nb.pth",
    b"..",
    b".",
    b"\xff\xfe\x00a",
    b"a\0b",
    b"x" * 5000,
    b"model_final.pth",
]


@pytest.mark.parametrize("content", POINTERS)
def test_pointers_to_no_checkpoint(tmp_path, content):
    (tmp_path / "last_checkpoint").write_bytes(content)
    with pytest.raises(UserError) as error:
        train(tiny.config(tiny.write_dataset(tmp_path / "set"), tmp_path), resume=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_pointer_that_is_a_folder_or_points_to_one(tmp_path):
    (tmp_path / "last_checkpoint").mkdir()
    with pytest.raises(UserError, match="last_checkpoint: cannot be read: it is a folder, expected a file"):
        last_checkpoint(tmp_path)
    (tmp_path / "last_checkpoint").rmdir()
    (tmp_path / "model_final.pth").mkdir()
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(UserError, match=r"model_final\.pth: is a folder"):
        read_checkpoint(last_checkpoint(tmp_path))


def test_code_in_an_entry_is_not_run(saved, tmp_path):
    class Harm:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    cfg, file = saved
    content = read_checkpoint(file)
    for path in [("model", "linear.bias"), ("optimizer", "state", 0), ("config",), ("ranks", 0, "random", "python")]:
        torch.save(put(content, path, Harm()), file)
        assert outcome(cfg, file) is None
    assert not (tmp_path / "harm").exists()


def test_a_flipped_byte_of_weights_is_found(tmp_path):
    file = tmp_path / "a.pth"
    write_checkpoint({"model": {"weight": torch.zeros(1000)}}, file)
    whole = bytearray(file.read_bytes())
    whole[whole.index(bytes(2000)) + 1000] = 1
    file.write_bytes(whole)
    with pytest.raises(UserError, match="checksum"):
        read_checkpoint(file)


def test_files_of_torch_have_no_checksum_and_load(tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "a.pth")
    torch.save({"weight": torch.ones(3)}, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    for name in "ab":
        assert read_checkpoint(tmp_path / f"{name}.pth")["weight"].tolist() == [1, 1, 1]


def test_torch_reads_ours(tmp_path):
    save_checkpoint(tmp_path, "a.pth", {"model": {"weight": torch.arange(1000)}})
    for options in ({}, {"mmap": True}):
        assert torch.equal(torch.load(tmp_path / "a.pth", **options)["model"]["weight"], torch.arange(1000))


def test_weights_that_are_not_finite_are_named():
    model = nn.Linear(2, 3)
    before = model.weight.clone()
    state = {"weight": torch.zeros(3, 2), "bias": torch.tensor([0.0, float("nan"), float("inf")])}
    with pytest.raises(UserError, match=r"a\.pth: weights that are not finite: bias \(2 of 3 numbers\)"):
        load_weights(model, state, "a.pth")
    assert torch.equal(model.weight, before)
    for kind in (torch.int64, torch.bool):
        with pytest.raises(UserError, match=r"mismatched bias \(got torch\.\w+, expected torch\.float32\)"):
            load_weights(model, {"weight": torch.zeros(3, 2), "bias": torch.zeros(3).to(kind)}, "a.pth")


@pytest.mark.parametrize(
    "content",
    [
        {"model": None},
        {"model": [1]},
        {"model": {"a": 1}},
        {"model": {1: torch.zeros(1)}},
        {"a": torch.zeros(2).to("meta")},
        {"a": torch.zeros(2, dtype=torch.complex64)},
        {"a": torch.eye(2).to_sparse()},
        {"epoch": 3, "state": {}},
    ],
)
def test_what_holds_no_weights(content):
    with pytest.raises(UserError) as error:
        state_dict_of(content, "a.pth")
    assert str(error.value).startswith("checkpoint a.pth: ") and "\n" not in str(error.value)
