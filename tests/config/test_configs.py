"""Every YAML is built; every mistake in a config is one line that names the key."""

from pathlib import Path

import pytest
import torch

import domainnorm as dn
from domainnorm.config import save_config
from domainnorm.engine.optim import build_optimizer

ROOT = Path(__file__).parents[2]
RCNN = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]
CONFIGS = [
    pytest.param(file, marks=pytest.mark.slow if "paper" in file.parts else (), id=str(file.relative_to(ROOT)))
    for file in sorted((ROOT / "configs").rglob("*.yaml"))
]


@pytest.mark.parametrize("file", CONFIGS)
def test_every_config_builds_a_model_which_takes_a_step(file):
    cfg = dn.load_config(file)
    heads = {"RetinaNet": "RETINANET", "GeneralizedRCNN": "ROI_HEADS", "Classifier": "CLASSIFIER"}
    head = heads[cfg.MODEL.META_ARCHITECTURE]
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", f"MODEL.{head}.NUM_CLASSES", 3]
    overrides += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4]
    if head == "CLASSIFIER":
        # of as few images as there are here
        overrides += ["MODEL.NORM.GHOSTBN.NUM_SAMPLE_GROUPS", 2, "MODEL.NORM.SEQNORM.NUM_SAMPLE_GROUPS", 2]
        overrides += ["MODEL.NORM.BRN.SAMPLES_PER_GROUP", 0]
    cfg = dn.load_config(file, overrides)
    model = dn.build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    if file.stem.endswith("_1x"):
        return  # the same model as without, as the next test says
    target = {"boxes": torch.tensor([[8.0, 8, 60, 50]]), "labels": torch.tensor([2])}
    if head == "CLASSIFIER":
        target["labels"] = torch.tensor(2)
    target["masks"] = torch.ones(1, 128, 96, dtype=torch.uint8)
    # Of each domain two images: one element of a 1 x 1 level has no variance.
    domains = [0, 0, 1, 1] if cfg.MODEL.NORM_DOMAINS else [0, 0]
    targets = [target | {"domain": torch.tensor(k)} for k in domains]
    size = (cfg.INPUT.CROP_SIZE,) * 2 if head == "CLASSIFIER" else (128, 96)
    losses = model([torch.rand(3, *size) for _ in targets], targets)
    sum(losses.values()).backward()
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    optimizer.step()
    after = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p.isfinite().all() for p in after) and sum(p.numel() for p in after) > 7e4
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > len(after) / 2


def test_every_row_of_the_papers_tables_has_a_config_in_both_schedules():
    rows = {f"table5/{row}" for row in ("row1", "row2", "row3", "row4", "row5", "row6", "gn", "none")}
    rows |= {f"table3_6/bn_{images}" for images in ("1_image", "2_images")}
    rows |= {f"table3_6/shuffle_{images}" for images in ("1_image", "2_images")}
    rows |= {f"table3_6/{norm}" for norm in ("syncbn", "gn", "none", "baseline_2fc")}
    for row in rows:
        full, short = (dn.load_config(ROOT / f"configs/paper/{row}{schedule}.yaml") for schedule in ("", "_1x"))
        assert (full.SOLVER.MAX_ITER, short.SOLVER.MAX_ITER, full.SOLVER.IMS_PER_BATCH) == (270000, 90000, 16)
        assert full.MODEL == short.MODEL


def test_a_saved_config_loads_equal(tmp_path):
    cfg = dn.load_config(
        ROOT / "configs/paper/table5/row4.yaml", ["SOLVER.BASE_LR", "2e-3", "DATASETS.TEST", "a.json:b"]
    )
    save_config(cfg, tmp_path / "config.yaml")
    assert dn.load_config(tmp_path / "config.yaml") == cfg
    assert cfg.SOLVER.BASE_LR == 0.002 and cfg.DATASETS.TEST == ["a.json:b"] and cfg.SOLVER.MAX_ITER == 270000


def test_base_files_and_overrides_take_precedence(tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER: {BASE_LR: 1, MAX_ITER: 7}\nDATASETS: {TRAIN: [a, b]}")
    (tmp_path / "top.yaml").write_text("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 8}\nDATASETS: {TRAIN: [c]}")
    cfg = dn.load_config(tmp_path / "top.yaml", ["SOLVER.MAX_ITER", "9"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.DATASETS.TRAIN) == (1.0, 9, ["c"])
    with pytest.raises(AttributeError):
        cfg.SOLVER.MAX_ITER = 1  # frozen


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.BSE_LR", "1"], "unknown key SOLVER.BSE_LR; the nearest known key is SOLVER.BASE_LR"),
        (["MODEL.RETINANET.NORMS", "BN"], "nearest known key is MODEL.RETINANET.NORM"),
        (["SOLVER", "1"], "unknown key SOLVER"),
        (["SOLVER.BASE_LR"], "KEY VALUE pairs, got 1 words"),
        (["SOLVER.MAX_ITER", "ten"], r"SOLVER.MAX_ITER takes int .*, got 'ten' \(str\)"),
        (["SOLVER.MAX_ITER", "1.5"], "SOLVER.MAX_ITER takes int"),
        (["SOLVER.MAX_ITER", "True"], "SOLVER.MAX_ITER takes int"),
        (["SOLVER.AMP.ENABLED", "1"], "SOLVER.AMP.ENABLED takes bool"),
        (["SOLVER.STEPS", "5"], "SOLVER.STEPS takes a list"),
        (["INPUT.MIN_SIZE_TRAIN", "['a']"], "INPUT.MIN_SIZE_TRAIN takes a list such as"),
        (["MODEL.RETINANET.NORM", "BatchNorm"], "MODEL.RETINANET.NORM takes one of .*got 'BatchNorm'"),
        (["TEST.STATISTICS", "running"], "TEST.STATISTICS takes any of .*got 'running'"),
        (["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH takes a number above 0"),
        (["MODEL.RETINANET.AFFINE", "per_domain"], "AFFINE 'per_domain' contradicts MODEL.RETINANET.NORM ''"),
        (
            ["MODEL.RETINANET.NORM", "GN", "MODEL.RETINANET.SGD_STATISTICS", "shared"],
            "SGD_STATISTICS 'shared' contradicts MODEL.RETINANET.NORM 'GN'",
        ),
        (["SOLVER.LR_SCHEDULER", "cosine", "SOLVER.STEPS", "[5]"], "contradicts SOLVER.LR_SCHEDULER"),
        (["SOLVER.STEPS", "[9, 5]"], "SOLVER.STEPS takes increasing"),
        (["SOLVER.STEPS", "[5, 5]"], "SOLVER.STEPS takes increasing"),
        (["SOLVER.STEPS", "[0, 5]"], "SOLVER.STEPS takes a number above 0"),
        (["SOLVER.STEPS", "['a']"], "SOLVER.STEPS takes a list"),
        (["DATASETS.TRAIN", "[3]"], "DATASETS.TRAIN takes a list"),
        (["DATALOADER.NUM_WORKERS", "-2"], "DATALOADER.NUM_WORKERS takes a number from -1 on, got -2"),
        (["INPUT.SCALE_JITTER", "[2.0, 0.5]"], "INPUT.SCALE_JITTER takes two increasing numbers, or "),
        (["INPUT.SCALE_JITTER", "[0.5]"], "INPUT.SCALE_JITTER takes two increasing numbers, or "),
        (["INPUT.RANDOM_FLIP", "3"], "INPUT.RANDOM_FLIP takes a number from 0 to 1"),
        (["INPUT.MIN_SIZE_TRAIN", "[0]"], "INPUT.MIN_SIZE_TRAIN takes a number above 0"),
        (["MODEL.RETINANET.PRIOR_PROB", "0.0"], "PRIOR_PROB takes a number above 0"),
        (["SOLVER.BASE_LR", "float('nan')"], "BASE_LR takes float"),
        (["SOLVER.BASE_LR", "1e400"], "BASE_LR takes a number above 0, got inf"),
        (["MODEL.PIXEL_MEAN", "[0.5]"], "MODEL.PIXEL_MEAN takes 3 numbers"),
        (["MODEL.PIXEL_STD", "[0, 1, 1]"], "MODEL.PIXEL_STD takes a number above 0"),
        (["TEST.STATISTICS", "[]"], "TEST.STATISTICS takes at least one"),
        (["TEST.EVAL_PERIOD", "3"], "TEST.EVAL_PERIOD 3 contradicts DATASETS.TEST"),
        (["SEED", str(2**32)], "SEED takes a number up to 4294967295, got 4294967296"),
        (["SOLVER.GAMMA", "-0.1"], "SOLVER.GAMMA takes a number above 0, up to 1, got -0.1"),
        (["MODEL.RETINANET.FOCAL_LOSS_ALPHA", "1.5"], "FOCAL_LOSS_ALPHA takes a number from 0 to 1, got 1.5"),
        (["MODEL.RETINANET.FOCAL_LOSS_GAMMA", "-1"], "FOCAL_LOSS_GAMMA takes a number from 0 on, got -1"),
        (["MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]"], "MODEL.PIXEL_MEAN takes a number from 0 to 1"),
        (
            ["MODEL.ANCHOR_GENERATOR.SIZES", "[32, 64]"],
            r"MODEL.ANCHOR_GENERATOR.SIZES \[32, 64\] contradicts MODEL.FPN.NUM_LEVELS 5: there are 2 sizes",
        ),
        (["SOLVER.NESTEROV", "True", "SOLVER.MOMENTUM", "0"], "SOLVER.NESTEROV True contradicts SOLVER.MOMENTUM 0"),
        (["MODEL.NORM.EPS", "1e-30"], "MODEL.NORM.EPS takes 0 or a number from 1e-12 on, got 1e-30"),
        (["SOLVER.FREEZE_NORM_AT", "1.5"], "FREEZE_NORM_AT takes an iteration, a whole number, or a share below 1"),
        (["MODEL.NORM.BRN.R_MAX_AT", "7.25"], "R_MAX_AT takes an iteration, a whole number, or a share below 1"),
        (
            ["MODEL.META_ARCHITECTURE", "Classifier", "MODEL.BACKBONE.NAME", "cifar_resnet100000"],
            "MODEL.BACKBONE.NAME takes depths and widths up to 9999, got 'cifar_resnet100000'",
        ),
        (["SEED", "-1"], "SEED takes a number from 0 on, got -1"),
        (["SOLVER.ACCUMULATE", "3"], "contradicts SOLVER.ACCUMULATE 3"),
        (
            ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16", "MODEL.DEVICE", "cpu"],
            "contradicts MODEL.DEVICE",
        ),
        (["INPUT.MAX_SIZE_TEST", "100"], "INPUT.MIN_SIZE_TEST 800 contradicts INPUT.MAX_SIZE_TEST 100"),
        (["INPUT.MIN_SIZE_TRAIN", "[]"], "INPUT.MIN_SIZE_TRAIN takes at least one"),
        (["MODEL.RETINANET.IOU_THRESHOLDS", "[0.5, 0.4]"], "RETINANET.IOU_THRESHOLDS takes two increasing"),
        (["MODEL.RPN.IOU_THRESHOLDS", "[0.5, 0.4]"], "RPN.IOU_THRESHOLDS takes two increasing"),
        (["MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.5, 0.6]"], "MODEL.ROI_HEADS.IOU_THRESHOLDS takes 1 numbers"),
        (["MODEL.META_ARCHITECTURE", "MaskRCNN"], "META_ARCHITECTURE takes one of .*nearest: 'GeneralizedRCNN'"),
        (["MODEL.MASK_ON", "True"], "MODEL.MASK_ON True contradicts MODEL.META_ARCHITECTURE 'RetinaNet'"),
        (["MODEL.ROI_HEADS.SHUFFLE", "True"], "SHUFFLE True contradicts MODEL.META_ARCHITECTURE 'RetinaNet'"),
        ([*RCNN, "MODEL.RETINANET.NORM", "BN"], "RETINANET.NORM 'BN' contradicts MODEL.META_ARCHITECTURE"),
        ([*RCNN, "MODEL.ROI_MASK_HEAD.NORM", "BN"], "ROI_MASK_HEAD.NORM 'BN' contradicts MODEL.MASK_ON False"),
        ([*RCNN, "MODEL.ROI_BOX_HEAD.NORM", "BN"], "ROI_BOX_HEAD.NORM 'BN' contradicts MODEL.ROI_BOX_HEAD.NUM_CONV 0"),
        ([*RCNN, "MODEL.ROI_BOX_HEAD.NUM_FC", "0"], "MODEL.ROI_BOX_HEAD.NUM_FC takes a number above 0"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(overrides, message):
    with pytest.raises(dn.UserError, match=message) as error:
        dn.load_config(None, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: [1", "not valid YAML"),
        ("- a\n- b", "expected a mapping"),
        ("word", "expected a mapping"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml does not exist"),
        ("SOLVER: {BASE_LRR: 1}", "unknown key SOLVER.BASE_LRR"),
        ("SOLVER: 3", "unknown key SOLVER;"),
        ("SOLVER: {BASE_LR: [1]}", "SOLVER.BASE_LR takes float"),
        ("SOLVER: {BASE_LR: !!python/object/apply:os.getcwd []}", "not valid YAML"),
        ("", "expected a mapping"),
        ("3", "expected a mapping"),
        ("SEED: 2020-13-45", "not valid YAML"),
        ("_BASE_: c.yaml", "is a _BASE_ of itself"),
        ("_BASE_: {a: b}", "_BASE_ takes a file or a list of files"),
        ("DATASETS: {TRAIN: {a: b}}", "DATASETS.TRAIN takes a list .*makes a mapping"),
        ("DATASETS: {TRAIN: [a.json: imgs]}", "DATASETS.TRAIN takes a list .*makes a mapping"),
        ("SOLVER: {BASE_LR:}", "SOLVER.BASE_LR takes float .*got None .*leave it out for its default, 0.01"),
    ],
)
def test_mistakes_in_files(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(dn.UserError, match=message) as error:
        dn.load_config(tmp_path / "c.yaml")
    assert "\n" not in str(error.value) and "c.yaml" in str(error.value)


def test_a_missing_file():
    with pytest.raises(dn.UserError, match=r"nowhere\.yaml: no such file"):
        dn.load_config("nowhere.yaml")
