"""Example weights chosen on a validation set, and what γ decays to."""

import json

import pytest
import tiny
import torch
from test_classifier import STATISTICS, classifier, config, patches, sets  # noqa: F401
from torch import nn

import domainnorm as dn
from domainnorm.data.patches import patches_file
from domainnorm.engine.optim import build_optimizer
from domainnorm.layers import DomainBatchNorm


def state_of(model):
    layers = [(m.statistics, m.example_weight) for m in model.modules() if isinstance(m, DomainBatchNorm)]
    return {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()], layers


def check_as_found(model, before):
    state, modes, layers = state_of(model)
    assert (modes, layers) == before[1:] and all(torch.equal(v, before[0][k]) for k, v in state.items())


def trained(sets, tmp_path, **others):  # noqa: F811
    model = classifier(sets, tmp_path, **others)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(*patches(sets, 48))["loss_cls"].backward()
        optimizer.step()
    return model


# ---- example weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["BN", "GN", "GhostBN", "SeqNorm", "BGN", "GBGN", "BRN"])
def test_one_weight(sets, tmp_path, norm):  # noqa: F811
    keys = {"MODEL__BACKBONE__NORM": norm, "DATASETS__TEST": sets[1:], "TEST__EXAMPLE_WEIGHTS": [0.5]}
    model = trained(sets, tmp_path, **keys)
    before = state_of(model)
    results = dn.evaluate(config(sets, tmp_path, **keys), model, ["population", "minibatch"])
    check_as_found(model, before)
    assert list(results) == ["population", "population_weighed", "minibatch"]
    assert results["population"] != results["population_weighed"]
    written = json.loads((tmp_path / "inference/population_weighed/example_weight.json").read_text())
    assert written == {"example_weight": 0.5, "scores": {}, "data set": ""}
    if norm != "GN":
        dn.set_example_weight(model.eval(), 0.5)
        again = dn.evaluate(config(sets, tmp_path / "again", DATASETS__TEST=sets[1:]), model, "population")
        assert again["population"] == results["population_weighed"]


@pytest.mark.parametrize(("metric", "largest"), [("top1", True), ("top5", True), ("loss", False)])
def test_the_best_by_any_metric(sets, tmp_path, metric, largest):  # noqa: F811
    keys = {"DATASETS__TEST": sets[1:], "TEST__EXAMPLE_WEIGHTS": [0.9, 0.0, 0.3]}
    keys["TEST__EXAMPLE_WEIGHT_DATASET"] = str(patches_file("patches_val", 40))
    cfg = config(sets, tmp_path, TEST__EXAMPLE_WEIGHT_METRIC=metric, **keys)
    dn.evaluate(cfg, trained(sets, tmp_path, **keys))
    written = json.loads((tmp_path / "inference/population_weighed/example_weight.json").read_text())
    values = {float(weight): found[metric] for weight, found in written["metrics"].items()}
    assert list(values) == [0.9, 0.0, 0.3] and all(
        found.keys() >= {"top1", "top5", "loss"} for found in written["metrics"].values()
    )
    best = (max if largest else min)(values.values())
    assert written["example_weight"] == min(weight for weight, value in values.items() if value == best)
    with pytest.raises(dn.UserError, match=r"EXAMPLE_WEIGHT_METRIC takes one of .*'top1'.*got 'AP'"):
        dn.evaluate(config(sets, tmp_path, TEST__EXAMPLE_WEIGHT_METRIC="AP", **keys), trained(sets, tmp_path, **keys))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_the_best_of_several_weights_is_chosen(sets, tmp_path, norm):  # noqa: F811
    validation = str(patches_file("patches_val", 40))
    weights = [0.0, 0.05, 0.3, 1.0]
    keys = {"MODEL__BACKBONE__NORM": norm, "DATASETS__TEST": sets[1:], "TEST__STATISTICS": ["population", "recomputed"]}
    model = trained(sets, tmp_path, **keys)
    before = state_of(model)
    chosen = {"TEST__EXAMPLE_WEIGHTS": weights, "TEST__EXAMPLE_WEIGHT_DATASET": validation}
    results = dn.evaluate(config(sets, tmp_path, **keys | chosen), model)
    check_as_found(model, before)
    assert list(results) == ["population", "population_weighed", "recomputed", "recomputed_weighed"]
    for name in ("population", "recomputed"):
        written = json.loads((tmp_path / f"inference/{name}_weighed/example_weight.json").read_text())
        scores = {float(weight): score for weight, score in written["scores"].items()}
        assert list(scores) == weights and written["data set"] == validation
        best = min(weight for weight in weights if scores[weight] == max(scores.values()))
        assert written["example_weight"] == best
        one = keys | {"TEST__EXAMPLE_WEIGHTS": [best], "TEST__STATISTICS": [name]}
        alone = dn.evaluate(config(sets, tmp_path / f"{name}_one", **one), model)
        assert alone[f"{name}_weighed"] == results[f"{name}_weighed"]
        tried = keys | {"TEST__EXAMPLE_WEIGHTS": [0.3], "TEST__STATISTICS": [name], "DATASETS__TEST": [validation]}
        on_validation = dn.evaluate(config(sets, tmp_path / f"{name}_tried", **tried), model)
        assert on_validation[f"{name}_weighed"]["classification"]["top1"] == scores[0.3]


def test_a_model_without_norms_has_nothing_to_weigh(sets, tmp_path, caplog):  # noqa: F811
    keys = {"MODEL__BACKBONE__NORM": "", "DATASETS__TEST": sets[1:], "TEST__EXAMPLE_WEIGHTS": [0.5]}
    results = dn.evaluate(config(sets, tmp_path, **keys), classifier(sets, tmp_path, **keys), STATISTICS)
    assert list(results) == STATISTICS and results["population"] == results["minibatch"]
    assert "without effect" in caplog.text and "nothing to recompute" in caplog.text


@pytest.mark.parametrize(("backbone", "head"), [("BN", "BN"), ("BN", "GN"), ("GN", "GN"), ("FrozenBN", "GN")])
def test_a_detector(tmp_path, backbone, head):
    data, validation = (tiny.write_dataset(tmp_path / name, 4) for name in ("set", "validation"))
    keys = {"MODEL__BACKBONE__NORM": backbone, "MODEL__RETINANET__NORM": head, "DATASETS__TEST": [data]}
    keys |= {"TEST__EXAMPLE_WEIGHTS": [0.0, 0.5], "TEST__EXAMPLE_WEIGHT_DATASET": validation}
    cfg = tiny.config(data, tmp_path / "out", **keys, TEST__RECOMPUTE__NUM_SAMPLES=8, SOLVER__BASE_LR=0.01)
    torch.manual_seed(0)
    model = dn.build_model(cfg)
    before = state_of(model)
    results = dn.evaluate(cfg, model)
    check_as_found(model, before)
    assert list(results) == ["population", "population_weighed"]
    written = json.loads((tmp_path / "out/inference/population_weighed/example_weight.json").read_text())
    best = max(written["scores"], key=written["scores"].get)
    assert written["example_weight"] == float(best) and set(written["scores"]) == {"0.0", "0.5"}
    assert (tmp_path / "out/inference/population_weighed/coco_instances_results.json").is_file()


def test_group_norms_of_timm(sets, tmp_path):  # noqa: F811
    """A run must not end in a traceback after its training."""
    pytest.importorskip("timm")
    keys = {"MODEL__BACKBONE__NAME": "timm/resnet50_gn", "DATASETS__TEST": sets[1:], "TEST__EXAMPLE_WEIGHTS": [0.5]}
    model = classifier(sets, tmp_path, **keys)
    assert "population" in dn.evaluate(config(sets, tmp_path, **keys), model)


def test_mistakes_in_the_choice_of_weights(sets, tmp_path):  # noqa: F811
    for keys, message in (
        ({"TEST__EXAMPLE_WEIGHTS": [0.1, 0.2]}, "EXAMPLE_WEIGHT_DATASET '' contradicts"),
        ({"TEST__EXAMPLE_WEIGHT_DATASET": sets[1]}, "give several weights"),
        ({"TEST__EXAMPLE_WEIGHTS": [2.0]}, "EXAMPLE_WEIGHTS takes a number from 0 to 1"),
        (
            {
                "TEST__EXAMPLE_WEIGHTS": [0.1, 0.2],
                "TEST__EXAMPLE_WEIGHT_DATASET": sets[1],
                "DATASETS__TEST": sets[1:],
            },
            "is one of DATASETS.TEST",
        ),
    ):
        with pytest.raises(dn.UserError, match=message):
            config(sets, tmp_path, **keys)


def test_a_missing_validation_set_shows_before_training(sets, tmp_path):  # noqa: F811
    keys = {"TEST__EXAMPLE_WEIGHTS": [0.1, 0.2], "TEST__EXAMPLE_WEIGHT_DATASET": "nowhere.npz"}
    with pytest.raises(dn.UserError, match=r"nowhere\.npz"):
        dn.train(config(sets, tmp_path / "out", DATASETS__TEST=sets[1:], **keys))
    assert not (tmp_path / "out").exists()


# ---- what γ decays to ----------------------------------------------------------------------------------------------


def parts():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 1), DomainBatchNorm(4), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)]
    model = nn.Sequential(*layers).double()
    for p in model.parameters():
        nn.init.uniform_(p, 0.2, 1.5)
    model[2].bias.requires_grad_(False)
    return model


def gradients_of(model, step):
    for k, p in enumerate(model.parameters()):
        p.grad = torch.sin(p.detach() * (k + 1) + step) if p.requires_grad else None


DECAYS = {"WEIGHT_DECAY": 0.3, "WEIGHT_DECAY_BIAS": 0.2}


def decay_of(name, target, decay_norm):
    """(decay, what it decays to) of each parameter."""
    if name.startswith(("1.", "2.")):
        return decay_norm, target if name.endswith("weight") else 0.0
    return DECAYS["WEIGHT_DECAY_BIAS" if name.endswith("bias") else "WEIGHT_DECAY"], 0.0


@pytest.mark.parametrize(("target", "decay_norm"), [(0, 0.0), (0, 0.4), (1, 0.4)])
@pytest.mark.parametrize("rule", ["SGD", "nesterov", "AdamW"])
def test_decay_by_the_formula(rule, target, decay_norm):
    """SGD's acts as a gradient of ½·decay·(p - target)², AdamW's apart from the moments; the rate changes meanwhile."""
    solver = DECAYS | {"WEIGHT_DECAY_NORM": decay_norm, "WEIGHT_DECAY_NORM_TARGET": target, "MOMENTUM": 0.8}
    solver |= {"OPTIMIZER": "AdamW"} if rule == "AdamW" else {"NESTEROV": rule == "nesterov"}
    cfg = dn.load_config(None, [word for key, value in solver.items() for word in (f"SOLVER.{key}", value)])
    model = parts()
    optimizer = build_optimizer(cfg, model)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in expected.items()} for _ in range(2))
    asked = {name for name, p in model.named_parameters() if p.requires_grad}
    for step in range(5):
        rate = 0.1 / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        gradients_of(model, step)
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        for name in asked:
            decay, to = decay_of(name, target, decay_norm)
            p, grad = expected[name], grads[name]
            if rule == "AdamW":
                first[name] = 0.9 * first[name] + 0.1 * grad
                second[name] = 0.999 * second[name] + 0.001 * grad**2
                m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                expected[name] = p - rate * decay * (p - to) - rate * m / (v.sqrt() + 1e-8)
                continue
            grad = grad + decay * (p - to)
            first[name] = grad if step == 0 else 0.8 * first[name] + grad
            expected[name] = p - rate * (grad + 0.8 * first[name] if rule == "nesterov" else first[name])
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adam", "RMSprop"])
def test_decay_alone_leads_to_its_target(optimizer):
    for target in (0.0, 1.0):
        words = ["SOLVER.WEIGHT_DECAY_NORM", 0.5, "SOLVER.WEIGHT_DECAY_NORM_TARGET", target, "SOLVER.BASE_LR", 0.2]
        layer = DomainBatchNorm(3)
        nn.init.constant_(layer.weight, 5.0), nn.init.constant_(layer.bias, 5.0)
        stepper = build_optimizer(dn.load_config(None, [*words, "SOLVER.OPTIMIZER", optimizer]), nn.Sequential(layer))
        for _ in range(300):
            for p in layer.parameters():
                p.grad = torch.zeros_like(p)
            stepper.step()
        torch.testing.assert_close(layer.weight.detach(), torch.full((3,), target), atol=1e-3, rtol=0)
        torch.testing.assert_close(layer.bias.detach(), torch.zeros(3), atol=1e-3, rtol=0)


def test_a_target_without_decay_is_a_contradiction():
    with pytest.raises(dn.UserError, match="WEIGHT_DECAY_NORM_TARGET"):
        dn.load_config(None, ["SOLVER.WEIGHT_DECAY_NORM_TARGET", 1.0])


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_step_that_is_skipped_for_its_overflow_changes_nothing(optimizer):
    """As by SOLVER.AMP in float16."""
    words = ["SOLVER.WEIGHT_DECAY_NORM", 0.5, "SOLVER.WEIGHT_DECAY_NORM_TARGET", 1.0, "SOLVER.OPTIMIZER", optimizer]
    layer = DomainBatchNorm(2)
    stepper, scaler = build_optimizer(dn.load_config(None, words), nn.Sequential(layer)), torch.amp.GradScaler("cpu")
    scaler.scale((layer.weight * float("inf")).sum() + layer.bias.sum()).backward()
    scaler.unscale_(stepper)
    scaler.step(stepper)
    assert torch.equal(layer.weight, torch.ones(2)) and torch.equal(layer.bias, torch.zeros(2))
