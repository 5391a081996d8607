"""Statistics frozen in the middle of training, and recomputed ones in the trainer."""

import json

import pytest
import tiny
import torch
from ranks import run_ranks
from torch import nn

import domainnorm as dn
from domainnorm.engine import train
from domainnorm.engine.describe import describe_normalization
from domainnorm.engine.optim import learning_rate
from domainnorm.modeling.checkpoint_file import read_checkpoint
from domainnorm.surgery.freeze import freeze_batchnorm


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, dn.DomainBatchNorm])
def test_frozen_from_and_to_any_batch_norm(kind):
    layer = kind(3, eps=1e-3, momentum=0.2)
    for value in (*layer.parameters(), *layer.buffers()):
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 2)
    frozen = dn.FrozenBatchNorm.from_batch_norm(layer)
    thawed = frozen.to_batch_norm(kind)
    assert type(thawed) is kind and (thawed.eps, thawed.momentum) == (1e-3, 0.2)
    x = torch.randn(2, 3, *[4] * (3 if kind is nn.BatchNorm3d else 1 if kind is nn.BatchNorm1d else 2))
    if kind is not nn.SyncBatchNorm:
        torch.testing.assert_close(frozen.train()(x), layer.eval()(x))
    torch.testing.assert_close(thawed.state_dict(), layer.state_dict())
    assert all(p.requires_grad for p in layer.parameters()) and not any(p.requires_grad for p in frozen.parameters())


def test_domains_stay_when_frozen_and_thawed():
    layer = dn.DomainBatchNorm(
        3, num_domains=4, sgd_statistics="shared", population_statistics="per_domain", affine="per_domain"
    )
    thawed = dn.FrozenBatchNorm.from_batch_norm(layer).to_batch_norm()
    assert repr(thawed) == repr(layer)
    with pytest.raises(ValueError, match="BatchNorm2d has one domain, this layer 4"):
        dn.FrozenBatchNorm.from_batch_norm(layer).to_batch_norm(nn.BatchNorm2d)
    with pytest.raises(ValueError, match="no running statistics"):
        dn.FrozenBatchNorm.from_batch_norm(nn.BatchNorm2d(3, track_running_stats=False))


def test_freezing_keeps_the_very_parameters():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(dn.DomainBatchNorm(3)))
    before = [id(p) for p in model.parameters()]
    freeze_batchnorm(model, ["2"], train_affine=True)
    assert isinstance(model[1], nn.BatchNorm1d) and isinstance(model[2][0], dn.FrozenBatchNorm)
    assert before == [id(p) for p in model.parameters()] and all(p.requires_grad for p in model.parameters())
    freeze_batchnorm(model)
    assert isinstance(model[1], dn.FrozenBatchNorm)
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False, True, True]


def test_a_layer_under_two_names_stays_one():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential())
    model.again = model[1].inner = model[0]
    freeze_batchnorm(model)
    assert isinstance(model[0], dn.FrozenBatchNorm) and model[0] is model.again is model[1].inner


FREEZE = {"SOLVER__FREEZE_NORM_AT": 0.5, "SOLVER__CHECKPOINT_PERIOD": 1, "SOLVER__BASE_LR": 0.001}


def buffers_of(folder, name):
    model = read_checkpoint(folder / name)["model"]
    return {key: value for key, value in model.items() if "running" in key}


@pytest.mark.parametrize("choices", [{}, {"SOLVER__FREEZE_NORM_LAYERS": ["head."]}], ids=["all", "named"])
def test_statistics_stop_at_the_switch(data_set, tmp_path, choices):
    train(tiny.config(data_set, tmp_path / "a", **FREEZE, **choices))
    half, after, final = (buffers_of(tmp_path / "a", f"model_{i}.pth") for i in ("0000002", "0000003", "final"))
    for key, value in half.items():
        frozen = not choices or key.startswith("head.")
        assert torch.equal(value, after[key]) == frozen and torch.equal(value, final[key]) == frozen, key


@pytest.mark.slow
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_frozen_run_resumes_to_the_bit_from_before_at_and_after_the_switch(data_set, tmp_path, affine, optimizer):
    choices = FREEZE | {"SOLVER__FREEZE_NORM_AFFINE": affine, "SOLVER__OPTIMIZER": optimizer}
    cfg = tiny.config(data_set, tmp_path / "a", **choices)
    train(cfg)
    whole = read_checkpoint(tmp_path / "a" / "model_final.pth")["model"]
    names = [key.replace("running_mean", "weight") for key in whole if key.endswith("running_mean")]
    two, final = (read_checkpoint(tmp_path / "a" / f"model_{i}.pth")["model"] for i in ("0000002", "final"))
    assert affine == all(torch.equal(two[name], final[name]) for name in names)
    for start in (1, 2, 3):
        (tmp_path / "a" / "last_checkpoint").write_text(f"model_{start:07d}.pth")
        train(cfg, resume=True)
        resumed = read_checkpoint(tmp_path / "a" / "model_final.pth")["model"]
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items()), start


def _train(_, cfg):
    train(cfg)


@pytest.mark.slow
def test_ranks_freeze_merged_statistics(data_set, tmp_path):
    run_ranks(_train, 2, tiny.config(data_set, tmp_path, **FREEZE, SOLVER__FREEZE_NORM_AFFINE=True))
    first, second = (of["buffers"] for of in read_checkpoint(tmp_path / "model_final.pth")["ranks"])
    assert all(torch.equal(first[key], second[key]) for key in first)
    first, second = (of["buffers"] for of in read_checkpoint(tmp_path / "model_0000002.pth")["ranks"])
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_a_share_of_the_iterations_cannot_be_stretched_on_resume(data_set, tmp_path):
    train(tiny.config(data_set, tmp_path, **FREEZE))
    with pytest.raises(dn.UserError, match=r"SOLVER\.MAX_ITER was 4, is 8"):
        train(tiny.config(data_set, tmp_path, SOLVER__MAX_ITER=8, **FREEZE), resume=True)


def test_learning_rate_warms_up_again(data_set, tmp_path):
    choices = {"SOLVER__MAX_ITER": 100, "SOLVER__FREEZE_NORM_AT": 80, "SOLVER__FREEZE_NORM_WARMUP_ITERS": 10}
    cfg = tiny.config(data_set, tmp_path, **choices, SOLVER__BASE_LR=1.0, SOLVER__WARMUP_FACTOR=0.1)
    rates = [round(learning_rate(cfg, i), 6) for i in (79, 80, 85, 90, 99)]
    assert rates == [1.0, 0.1, 0.55, 1.0, 1.0]


def test_mistakes(data_set, tmp_path):
    with pytest.raises(dn.UserError, match=r"FREEZE_NORM_AFFINE True contradicts SOLVER\.FREEZE_NORM_AT 0"):
        tiny.config(data_set, tmp_path, SOLVER__FREEZE_NORM_AFFINE=True)
    with pytest.raises(dn.UserError, match="no BatchNorm has a name that begins with 'neck'"):
        train(tiny.config(data_set, tmp_path / "out", **FREEZE, SOLVER__FREEZE_NORM_LAYERS=["neck"]))
    assert not (tmp_path / "out").exists()  # before anything is written


# recomputed statistics

RECOMPUTE = {"TEST__STATISTICS": ["recomputed", "population", "minibatch"], "TEST__RECOMPUTE__NUM_SAMPLES": 16}


@pytest.mark.parametrize("choices", [{}, tiny.MASK_RCNN], ids=["RetinaNet", "Mask R-CNN"])
@pytest.mark.parametrize("method", ["pooled", "mean_of_variances", "exact"])
def test_three_statistics_side_by_side(data_set, tmp_path, method, choices):
    choices = choices | RECOMPUTE | {"DATASETS__TEST": [data_set], "TEST__RECOMPUTE__METHOD": method}
    cfg = tiny.config(data_set, tmp_path, **choices)
    torch.manual_seed(0)
    model = dn.build_model(cfg)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    draws = torch.get_rng_state()
    dn.evaluate(cfg, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(draws, torch.get_rng_state()) and model.training
    files = [tmp_path / "inference" / name / "coco_instances_results.json" for name in RECOMPUTE["TEST__STATISTICS"]]
    texts = [file.read_text() for file in files]
    assert len(set(texts)) == 3
    assert list(json.loads((tmp_path / "results.json").read_text())) == RECOMPUTE["TEST__STATISTICS"]
    dn.evaluate(cfg, model, statistics="population")  # by itself the same
    assert files[1].read_text() == texts[1]


@pytest.mark.slow
def test_the_checkpoint_keeps_its_own_unless_asked(data_set, tmp_path):
    for folder, asked in (("own", False), ("recomputed", True)):
        choices = RECOMPUTE | {"DATASETS__TEST": [data_set], "TEST__RECOMPUTE__IN_CHECKPOINT": asked}
        train(tiny.config(data_set, tmp_path / folder, **choices))
    own, recomputed = (read_checkpoint(tmp_path / f / "model_final.pth")["model"] for f in ("own", "recomputed"))
    assert {key for key in own if not torch.equal(own[key], recomputed[key])} == {k for k in own if "running" in k}
    # evaluated is what was saved
    results = [
        (tmp_path / "recomputed/inference" / name / "coco_instances_results.json").read_text()
        for name in ("population", "recomputed")
    ]
    assert results[0] == results[1]


def test_nothing_to_recompute_is_the_population(data_set, tmp_path, caplog):
    choices = RECOMPUTE | {"DATASETS__TEST": [data_set], "MODEL__RETINANET__NORM": "GN", "MODEL__BACKBONE__NORM": "GN"}
    cfg = tiny.config(data_set, tmp_path, **choices)
    dn.evaluate(cfg, dn.build_model(cfg))
    assert "nothing to recompute" in caplog.text
    files = [tmp_path / "inference" / name / "coco_instances_results.json" for name in ("recomputed", "population")]
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.slow
def test_a_target_domain_that_does_not_fit_is_refused_before_training(data_set, tmp_path):
    for target, message in (("nowhere.json:images", "nowhere"), ("shapes_val", "categories")):
        cfg = tiny.config(data_set, tmp_path / "out", **RECOMPUTE, TEST__RECOMPUTE__DATASET=target)
        with pytest.raises(dn.UserError, match=message):
            train(cfg)
        assert not (tmp_path / "out").exists()


def test_the_target_domain(data_set, tmp_path):
    other = tiny.write_dataset(tmp_path / "other", size=96)
    found = []
    for target in ("", other):
        choices = RECOMPUTE | {"DATASETS__TEST": [data_set], "TEST__RECOMPUTE__DATASET": target}
        cfg = tiny.config(data_set, tmp_path / "out", **choices)
        torch.manual_seed(0)
        dn.evaluate(cfg, dn.build_model(cfg), statistics="recomputed")
        found.append((tmp_path / "out/inference/recomputed/coco_instances_results.json").read_text())
    assert found[0] != found[1]


# averaged weights

AVERAGE = {"SOLVER__AVERAGE_WEIGHTS_FROM": 2, "SOLVER__CHECKPOINT_PERIOD": 1, "SOLVER__BASE_LR": 0.001}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SWA", "EMA"])
def test_averaged_weights_with_statistics_recomputed_for_them(data_set, tmp_path, kind):
    choices = AVERAGE | RECOMPUTE | {"SOLVER__AVERAGE_WEIGHTS": kind, "SOLVER__AVERAGE_WEIGHTS_DECAY": 0.75}
    cfg = tiny.config(data_set, tmp_path / "a", DATASETS__TEST=[data_set], **choices)
    returned = train(cfg)
    third, final, averaged = (
        read_checkpoint(tmp_path / "a" / f"model_{name}.pth")["model"] for name in ("0000003", "final", "averaged")
    )
    share = 0.5 if kind == "SWA" else 0.75
    for name, _ in returned.named_parameters():
        torch.testing.assert_close(averaged[name], share * third[name] + (1 - share) * final[name])
    texts = [  # the average is evaluated, and its own statistics are the recomputed ones
        (tmp_path / "a/inference" / name / "coco_instances_results.json").read_text()
        for name in ("population", "recomputed")
    ]
    assert texts[0] == texts[1]
    torch.testing.assert_close(returned.state_dict(), averaged, rtol=0, atol=0)

    (tmp_path / "a" / "last_checkpoint").write_text("model_0000003.pth")
    train(cfg, resume=True)
    resumed = read_checkpoint(tmp_path / "a" / "model_averaged.pth")["model"]
    torch.testing.assert_close(resumed, averaged, rtol=0, atol=0)


@pytest.mark.slow
def test_evaluating_the_average_on_the_way_leaves_no_trace(data_set, tmp_path):
    choices = tiny.MASK_RCNN | AVERAGE | RECOMPUTE | {"SOLVER__AVERAGE_WEIGHTS": "EMA", "DATASETS__TEST": [data_set]}
    weights = []
    for period in (0, 1):
        train(tiny.config(data_set, tmp_path / str(period), TEST__EVAL_PERIOD=period, **choices))
        weights.append(read_checkpoint(tmp_path / str(period) / "model_final.pth")["model"])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def _train_average(_, cfg):
    return train(cfg).state_dict()


@pytest.mark.slow
def test_ranks_have_the_same_average(data_set, tmp_path):
    choices = AVERAGE | RECOMPUTE | {"SOLVER__AVERAGE_WEIGHTS": "SWA", "SOLVER__FREEZE_NORM_AT": 3}
    first, second = run_ranks(_train_average, 2, tiny.config(data_set, tmp_path, **choices))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# what is normalized together, said in the log


def _describe(_, cfg):
    return describe_normalization(cfg, dn.build_model(cfg))


@pytest.mark.slow
def test_the_log_says_what_the_normalization_batches_are(data_set, tmp_path, caplog):
    with caplog.at_level("INFO"):
        train(tiny.config(data_set, tmp_path, SOLVER__ACCUMULATE=2, SOLVER__MAX_ITER=1))
    (line,) = (record.getMessage() for record in caplog.records if "normalization batches" in record.getMessage())
    assert "backbone.body x34: 2 images x height x width, of one process" in line
    assert "head.classification_head x1: 2 images x height x width of each level, of one process" in line

    options = {"MODEL__BACKBONE__NORM": "SyncBN", "MODEL__ROI_HEADS__SHUFFLE": True, "MODEL__FPN__NORM": "GN"}
    cfg = tiny.config(data_set, tmp_path, **(tiny.MASK_RCNN | options))
    line, other = run_ranks(_describe, 2, cfg)
    assert line == other and "backbone.body x34: 2 images x height x width x 2 processes" in line
    assert "backbone.fpn x8: a sample alone, by groups of channels" in line
    assert (
        "roi_heads.box_head x1: up to 1024 RoIs, a random share of those of 4 images, x 7 x 7, of one process" in line
    )
    assert "roi_heads.mask_head x1: up to 256 RoIs, a random share of those of 4 images, x 14 x 14" in line
