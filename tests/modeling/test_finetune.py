"""A detector that begins with the weights of another: which of them it has, and what is refused."""

import logging
from pathlib import Path

import pytest
import tiny
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

import domainnorm as dn
from domainnorm.modeling.checkpoint_file import write_checkpoint
from domainnorm.modeling.pretrained import read_weights
from domainnorm.surgery.replace import replace_layers

ROOT = Path(__file__).parents[2]
SMALL = {"min_size": 96, "max_size": 160}


def shaken(model, image):
    """With statistics and affines of norms that are not 0 and 1, and predictions that differ from place to place."""
    generator = torch.Generator().manual_seed(0)

    def draw(like, low, high):
        like.copy_(torch.empty(like.shape).uniform_(low, high, generator=generator))

    def spread(layer, inputs, output):
        handles.pop(layer).remove()
        dims = [k for k in range(output.ndim) if k != 1]
        scale = (2.0 if output.shape[1] % 4 or output.shape[1] > 400 else 0.3) / output.std(dims).clamp(min=1e-6)
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias.copy_(layer.bias * scale - output.mean(dims) * scale)
        return layer(*inputs)

    handles = {}
    with torch.no_grad():
        for name, layer in model.named_modules():
            if getattr(layer, "running_mean", None) is not None:
                draw(layer.running_mean, -0.1, 0.1)
                draw(layer.running_var, 0.5, 1.5)
                draw(layer.weight, 0.4, 0.8)
                draw(layer.bias, -0.1, 0.1)
            elif name.endswith(("cls_logits", "cls_score", "bbox_pred", "bbox_reg")):
                handles[layer] = layer.register_forward_hook(spread)
        model.eval()([image])
    assert not handles
    return model


MODELS = {  # of torchvision -> our config, number of classes, what torchvision calls the threshold of scores
    "retinanet_resnet50_fpn": ("retinanet_v1", "RETINANET", 91, "score_thresh"),
    "retinanet_resnet50_fpn_v2": ("retinanet", "RETINANET", 91, "score_thresh"),
    "fasterrcnn_resnet50_fpn": ("faster_rcnn_v1", "ROI_HEADS", 90, "box_score_thresh"),
    "fasterrcnn_resnet50_fpn_v2": ("faster_rcnn", "ROI_HEADS", 90, "box_score_thresh"),
    "maskrcnn_resnet50_fpn": ("mask_rcnn_v1", "ROI_HEADS", 90, "box_score_thresh"),
    "maskrcnn_resnet50_fpn_v2": ("mask_rcnn", "ROI_HEADS", 90, "box_score_thresh"),
}


def as_with_weights(_, layer):
    """What torchvision has with weights=COCO_V1: frozen layers, without an eps."""
    return FrozenBatchNorm2d(layer.num_features, eps=0.0) if isinstance(layer, nn.BatchNorm2d) else layer


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_with_torchvisions_weights_it_finds_what_torchvisions_model_finds(name, tmp_path):
    config, node, classes, threshold = MODELS[name]
    first = 0 if node == "RETINANET" else 1  # the label that is the first one of ours
    theirs = getattr(detection, name)(weights=None, weights_backbone=None, **SMALL, **{threshold: 0.01})
    if "v2" not in name:
        replace_layers(theirs, as_with_weights)
    shaken(theirs, torch.rand(3, 120, 90))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    cfg = dn.load_config(
        ROOT / f"configs/finetune/{config}.yaml",
        [
            *(
                "MODEL.DEVICE",
                "cpu",
                "MODEL.WEIGHTS",
                str(tmp_path / "theirs.pth"),
                f"MODEL.{node}.NUM_CLASSES",
                classes,
            ),
            *("INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 160, f"MODEL.{node}.SCORE_THRESH_TEST", 0.01),
        ],
    )
    ours = dn.build_model(cfg, trained=True).eval()
    images = [torch.rand(3, 120, 90), torch.rand(3, 70, 110)]
    with torch.no_grad():
        expected, found = [theirs([image])[0] for image in images], ours(images)
    for one, other in zip(expected, found, strict=True):
        assert len(one["labels"]) > 50 and len(one["labels"].unique()) > 3
        # Two of one score may come in either order: they are told apart by their boxes.
        other["labels"] += first
        places = [torch.column_stack([of["boxes"], 100 * of["labels"], 100 * of["scores"]]) for of in (one, other)]
        order = torch.cdist(*places, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        assert len(order.unique()) == len(order) == len(other["boxes"])
        other = {key: value[order] for key, value in other.items()}
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(other["scores"], one["scores"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(other["boxes"], one["boxes"], atol=1e-3, rtol=1e-4)
        assert ("masks" in one) == ("masks" in other) == ("mask" in name)
        if "masks" in one:
            torch.testing.assert_close(other["masks"], one["masks"], atol=1e-4, rtol=1e-4)


# --- our own detectors ----------------------------------------------------------------------------------------------

OWN = {"DATASETS__TRAIN": [], "MODEL__BACKBONE__NORM": "GN"}
RETINANET, RCNN = OWN, tiny.MASK_RCNN | OWN
LOGITS = "head.classification_head.cls_logits"


def build(names, folder, weights="", architecture=RETINANET, **others):
    choices = architecture | {"MODEL__CLASS_NAMES": names, "MODEL__WEIGHTS": str(weights)} | others
    return dn.build_model(tiny.config("", folder, **choices))


def saved(model, file, **others):
    write_checkpoint({"model": model.state_dict(), "description": model.description} | others, file)
    return file


def same(model, other, without=()):
    """The keys of `model`, but for those that begin with one of `without`, which are equal in both."""
    own, theirs = model.state_dict(), other.state_dict()
    keys = {key for key in own if not key.startswith(tuple(without) or ("-",))}
    return all(torch.equal(own[key], theirs[key]) for key in keys) and len(keys) > 100


def test_rows_of_the_same_class_are_kept(tmp_path, caplog):
    old = build(["cat", "dog", "cow"], tmp_path)
    file = saved(old, tmp_path / "old.pth")
    new = build(["yak", "cow", "emu", "cat"], tmp_path, file)
    total = len(new.state_dict())
    assert caplog.messages == [
        f"{file}: {total - 2} of {total} entries loaded; initialized anew: {LOGITS}.{{weight,bias}}: "
        "3 → 4 classes, 2 of them by name"
    ]
    assert same(new, old, [LOGITS])
    layers = [model.head.classification_head.cls_logits for model in (old, new)]
    (one, other), biases = ([layer.weight.unflatten(0, (9, -1)) for layer in layers], [layer.bias for layer in layers])
    assert torch.equal(one[:, [2, 0]], other[:, [1, 3]]) and not torch.equal(one[:, 1], other[:, 0])
    assert torch.equal(biases[0].unflatten(0, (9, 3))[:, 2], biases[1].unflatten(0, (9, 4))[:, 1])


def test_rows_of_a_box_and_mask_head(tmp_path, caplog):
    old = build(["cat", "dog"], tmp_path, architecture=RCNN)
    new = build(["dog", "emu", "yak"], tmp_path, saved(old, tmp_path / "old.pth"), RCNN)
    assert same(new, old, ["roi_heads.box_predictor", "roi_heads.mask_predictor.mask_fcn_logits"])
    total = len(new.state_dict())
    assert f"{total - 6} of {total} entries" in caplog.text and caplog.text.count("2 → 3 classes, 1 of them") == 3
    one, other = (model.roi_heads.box_predictor for model in (old, new))
    assert torch.equal(one.cls_score.weight[[0, 2]], other.cls_score.weight[:2])  # background and dog
    assert torch.equal(one.bbox_pred.weight[8:12], other.bbox_pred.weight[4:8])
    one, other = (model.roi_heads.mask_predictor.mask_fcn_logits for model in (old, new))
    assert torch.equal(one.weight[2], other.weight[1])


def test_without_names_only_the_number_counts(tmp_path, caplog):
    old = build(["cat", "dog"], tmp_path)
    torch.save(old.state_dict(), tmp_path / "old.pth")
    assert same(build(["a", "b"], tmp_path, tmp_path / "old.pth"), old)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    build(["a", "b", "c"], tmp_path, tmp_path / "old.pth")
    assert f"initialized anew: {LOGITS}.{{weight,bias}}: 2 → 3 classes" in caplog.text and "by name" not in caplog.text


def test_a_mask_branch_comes_and_goes(tmp_path, caplog):
    parts = ["roi_heads.mask_head", "roi_heads.mask_predictor"]
    masked = build(["a"], tmp_path, architecture=RCNN)
    without = RCNN | {"MODEL__MASK_ON": False, "MODEL__ROI_MASK_HEAD__NORM": ""}
    boxes = build(["a"], tmp_path, saved(masked, tmp_path / "masked.pth"), without)
    assert same(boxes, masked) and "left out: roi_heads.mask_head, roi_heads.mask_predictor" in caplog.text
    caplog.clear()
    again = build(["a"], tmp_path, saved(boxes, tmp_path / "boxes.pth"), RCNN)
    assert same(again, boxes, parts) and f"initialized anew: {', '.join(parts)}" in caplog.text
    for file, architecture in (("masked.pth", without), ("boxes.pth", RCNN)):
        cfg = tiny.config("", tmp_path, **architecture, MODEL__CLASS_NAMES=["a"], MODEL__WEIGHTS=str(tmp_path / file))
        with pytest.raises(dn.UserError, match=r"weights do not fit the model: (missing|unexpected) roi_heads.mask"):
            dn.build_model(cfg, trained=True)


def test_what_else_differs_is_refused_or_begins_anew(tmp_path, caplog):
    old = build(["a", "b"], tmp_path)
    file = saved(old, tmp_path / "old.pth")
    others = {"MODEL__FPN__OUT_CHANNELS": 16}
    with pytest.raises(dn.UserError, match=r"old.pth: weights do not fit the model: .*WEIGHTS_STRICT False"):
        build(["a", "b"], tmp_path, file, **others)
    new = build(["a", "b"], tmp_path, file, **others, MODEL__WEIGHTS_STRICT=False)
    assert same(new.backbone.body, old.backbone.body)
    (line,) = [message for message in caplog.messages if "old.pth" in message]
    assert "initialized anew: backbone.fpn.inner_blocks.0.0.weight, " in line
    number = sum(v.shape == old.state_dict()[k].shape for k, v in new.state_dict().items())
    assert f"{number} of {len(new.state_dict())} entries loaded" in line
    with pytest.raises(dn.UserError, match=r"not one of its .* entries is in them"):
        torch.save({"x": torch.zeros(1)}, tmp_path / "x.pth")
        build(["a"], tmp_path, tmp_path / "x.pth", MODEL__WEIGHTS_STRICT=False)


def test_to_predict_every_class_must_be_there(tmp_path):
    old = build(["a", "b", "c"], tmp_path)
    file = str(saved(old, tmp_path / "old.pth"))
    cfg = tiny.config("", tmp_path, **OWN, MODEL__CLASS_NAMES=["c", "a"], MODEL__WEIGHTS=file)
    new = dn.build_model(cfg, trained=True)  # b is not asked for
    image = torch.rand(3, 64, 64)
    features = list(old.eval().backbone(image[None]).values())
    one, other = (model.eval().head(features)["cls_logits"] for model in (old, new))
    torch.testing.assert_close(one[..., [2, 0]], other)
    cfg = tiny.config("", tmp_path, **OWN, MODEL__CLASS_NAMES=["a", "d"], MODEL__WEIGHTS=file)
    with pytest.raises(dn.UserError, match=r"of the classes \['a', 'b', 'c'\], it has \['a', 'd'\]; set MODEL.CLASS"):
        dn.build_model(cfg, trained=True)


def wrapped(how, state):
    return {
        "state_dict": lambda: {"state_dict": state, "epoch": 3},
        "model": lambda: {"model": state, "optimizer": {}},
        "plain": lambda: state,
        "DDP": lambda: {"model": {f"module.{key}": value for key, value in state.items()}},
        "compiled": lambda: {f"_orig_mod.{key}": value for key, value in state.items()},
        "compiled in DDP": lambda: {f"module._orig_mod.{key}": value for key, value in state.items()},
        "averaged": lambda: {f"module.{key}": v for key, v in state.items()} | {"n_averaged": torch.tensor(3)},
        "Lightning": lambda: {
            "state_dict": {f"net.{key}": v for key, v in state.items()} | {"loss.weight": torch.ones(2)},
            "pytorch-lightning_version": "2.5.0",
        },
    }[how]()


@pytest.mark.parametrize(
    "how", ["state_dict", "model", "plain", "DDP", "compiled", "compiled in DDP", "averaged", "Lightning"]
)
def test_wrapped(tmp_path, how):
    old = build(["a", "b"], tmp_path)
    torch.save(wrapped(how, old.state_dict()), tmp_path / "w.pth")
    assert same(build(["a", "b"], tmp_path, tmp_path / "w.pth"), old)
    # … and the backbone of a classifier
    torch.save(wrapped(how, torchvision.models.mobilenet_v3_small().state_dict()), tmp_path / "c.pth")
    new = build(["a"], tmp_path, tmp_path / "c.pth", MODEL__BACKBONE__NORM="BN")
    theirs = read_weights(str(tmp_path / "c.pth")).state_dict
    key = next(key for key in theirs if key.endswith("features.0.0.weight"))
    assert torch.equal(theirs[key], new.backbone.body.get_submodule("0.0").weight)


def test_safetensors(tmp_path):
    old = build(["a", "b"], tmp_path)
    save_file({key: value.contiguous() for key, value in old.state_dict().items()}, tmp_path / "w.safetensors")
    assert same(build(["a", "b"], tmp_path, tmp_path / "w.safetensors"), old)
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    with pytest.raises(dn.UserError, match=r"broken.safetensors.*: broken or truncated"):
        build(["a"], tmp_path, tmp_path / "broken.safetensors")


def test_names_of_torchvisions_classes(tmp_path):
    """By the name of its file: 91 for a RetinaNet, 90 where background is apart."""
    torch.save({"head.x": torch.zeros(1)}, tmp_path / "retinanet_resnet50_fpn_coco-eeacb38b.pth")
    names = read_weights(str(tmp_path / "retinanet_resnet50_fpn_coco-eeacb38b.pth")).class_names
    assert len(names) == len(set(names)) == 91 and names[1] == "person" and names[18] == "dog"
    torch.save({"roi_heads.x": torch.zeros(1)}, tmp_path / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
    names = read_weights(str(tmp_path / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")).class_names
    assert len(names) == 90 and names[0] == "person" and names[17] == "dog"
    torch.save({"x": torch.zeros(1)}, tmp_path / "mine.pth")
    assert read_weights(str(tmp_path / "mine.pth")).class_names == []


def test_a_class_of_coco_keeps_its_rows(tmp_path, caplog):
    theirs = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    torch.save(theirs.state_dict(), tmp_path / "retinanet_resnet50_fpn_coco-eeacb38b.pth")
    words = ["MODEL.DEVICE", "cpu", "MODEL.CLASS_NAMES", ["dog", "robot"]]
    words += ["MODEL.WEIGHTS", str(tmp_path / "retinanet_resnet50_fpn_coco-eeacb38b.pth")]
    ours = dn.build_model(dn.load_config(ROOT / "configs/finetune/retinanet_v1.yaml", words))
    assert f"{LOGITS}.{{weight,bias}}: 91 → 2 classes, 1 of them by name" in caplog.text
    one, other = (m.head.classification_head.cls_logits.weight.unflatten(0, (9, -1)) for m in (theirs, ours))
    assert torch.equal(one[:, 18], other[:, 0])


def test_a_detector_is_trained_from_another(tmp_path):
    """The line is in the log of the run, and the first loss is lower than from random weights."""
    data_set = tiny.write_dataset(tmp_path / "set")
    old = build(["kind 3", "other"], tmp_path)
    file = saved(old, tmp_path / "old.pth")
    dn.train(tiny.config(data_set, tmp_path / "run", MODEL__BACKBONE__NORM="GN", MODEL__WEIGHTS=str(file)))
    log = (tmp_path / "run/log.txt").read_text()
    assert f"initialized anew: {LOGITS}.{{weight,bias}}: 2 → 2 classes, 1 of them by name" in log


# --- levels and backbones -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [RETINANET, RCNN], ids=["RetinaNet", "Mask R-CNN"])
@pytest.mark.parametrize("number", [2, 3, 4, 6])
def test_any_number_of_levels(tmp_path, architecture, number):
    sizes = {"MODEL__FPN__NUM_LEVELS": number, "MODEL__ANCHOR_GENERATOR__SIZES": [16 << k for k in range(number)]}
    model = build(["a"], tmp_path, architecture=architecture, **sizes)
    first = 3 if architecture is RETINANET else 2
    maps = list(model.backbone(torch.zeros(1, 3, 512, 256)).values())
    assert [tuple(x.shape) for x in maps] == [(1, 8, 512 >> k, 256 >> k) for k in range(first, first + number)]
    targets = [{"boxes": torch.tensor([[8.0, 8, 60, 50]]), "labels": torch.tensor([0])}] * 2
    targets = [target | {"masks": torch.ones(1, 128, 96, dtype=torch.uint8)} for target in targets]
    losses = model.train()([torch.rand(3, 128, 96)] * 2, targets)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(model.eval()([torch.rand(3, 64, 64)])) == 1


def test_p6_of_c5_or_p5(tmp_path):
    models = [build(["a"], tmp_path, MODEL__FPN__P6_FROM=of) for of in ("c5", "p5")]
    assert [m.backbone.fpn.extra_blocks.p6.in_channels for m in models] == [576, 8]
    maps = models[1].backbone(torch.rand(1, 3, 256, 256))
    torch.testing.assert_close(maps["p6"], models[1].backbone.fpn.extra_blocks.p6(maps["2"]))
    torch.testing.assert_close(maps["p7"], models[1].backbone.fpn.extra_blocks.p7(maps["p6"].relu()))


NAMES = [
    *("resnext50_32x4d", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "densenet121", "regnet_y_400mf"),
    *("shufflenet_v2_x0_5", "mnasnet0_5", "swin_t", "vgg11", "googlenet"),
    *("timm/resnet10t", "timm/mobilenetv3_small_050", "timm/convnext_atto", "timm/efficientnet_lite0"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_any_backbone(name, tmp_path, caplog):
    """Maps of the right strides; the weights of the classifier, with its own names, fit; all of it is trained."""
    if name.startswith("timm/"):
        theirs = pytest.importorskip("timm").create_model(name.removeprefix("timm/"))
    else:
        plain = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
        theirs = torchvision.models.get_model(name, weights=None, **plain)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    choices = {"MODEL__BACKBONE__NAME": name, "MODEL__BACKBONE__NORM": "BN"}
    for architecture, first in ((OWN, 3), (RCNN, 2)):
        model = build(["a"], tmp_path, tmp_path / "theirs.pth", architecture, **choices)
        own, given = model.backbone.classifier_part.state_dict(), theirs.state_dict()
        assert all(torch.equal(value, given[key]) for key, value in own.items() if "num_batches" not in key)
        assert len(own) > 0.6 * len(given) - 8 or name.startswith("vgg")
        maps = list(model.backbone(torch.rand(2, 3, 128, 192)).values())
        assert [x.shape[-2:] for x in maps] == [(-(-128 >> k), -(-192 >> k)) for k in range(first, first + 5)]
        sum(x.sum() for x in maps).backward()
        unused = [key for key, parameter in model.backbone.named_parameters() if parameter.grad is None]
        assert not unused
        assert not any(type(m) is nn.BatchNorm2d for m in model.backbone.modules())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet51",
            "NAME resnet51: a detector takes a name of torchvision.models, or timm/NAME; the nearest .* resnet",
        ),
        ("vit_b_16", r"NAME vit_b_16: a pyramid takes maps of strides \[8, 16, 32\], it has none of"),
        ("timm/resnet10x", "unknown to timm; the nearest name is resnet10t"),
        ("timm/vit_tiny_patch16_224", r"takes maps of strides \[8, 16, 32\], it has none of \[8, 32\]"),
        ("cifar_resnet8", "NAME cifar_resnet8: a detector takes"),
        ("a b", "takes a name of torchvision.models, or timm/NAME, got 'a b'"),
    ],
)
def test_what_is_no_backbone(name, message, tmp_path):
    with pytest.raises(dn.UserError, match=message):
        build(["a"], tmp_path, MODEL__BACKBONE__NAME=name)


def test_stages_of_other_backbones_are_frozen(tmp_path):
    model = build(["a"], tmp_path, MODEL__BACKBONE__NAME="regnet_y_400mf", MODEL__BACKBONE__FREEZE_AT=2)
    trained = {key.partition(".block")[2][:1] for key, p in model.backbone.body.named_parameters() if p.requires_grad}
    assert trained == {"2", "3", "4"}
    with pytest.raises(dn.UserError, match=r"FREEZE_AT 2 contradicts NAME 'timm/resnet10t', .*: set it to 0"):
        build(["a"], tmp_path, MODEL__BACKBONE__NAME="timm/resnet10t", MODEL__BACKBONE__FREEZE_AT=2)
