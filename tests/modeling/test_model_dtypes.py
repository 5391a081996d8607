"""Detectors and classifiers train and predict in every floating type that torch trains in."""

import pytest
import torch

import domainnorm as dn

COMMON = [
    "MODEL.BACKBONE.NAME",
    "mobilenet_v3_small",
    "MODEL.BACKBONE.NORM",
    "BN",
    "MODEL.BACKBONE.FREEZE_AT",
    0,
    "MODEL.DEVICE",
    "cpu",
]
DETECTOR = [
    *("MODEL.FPN.OUT_CHANNELS", 8, "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[8, 16, 32, 48, 64]", "MODEL.RETINANET.NUM_CLASSES", 3),
    *("MODEL.RETINANET.NUM_CONVS", 1, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "MODEL.ROI_HEADS.NUM_CLASSES", 3),
]
MASK_RCNN = [
    *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", True, "MODEL.RETINANET.NORM", ""),
    *("MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.CONV_DIM", 8, "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    *("MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
]
CLASSIFIER = [
    *("MODEL.META_ARCHITECTURE", "Classifier", "MODEL.CLASSIFIER.NUM_CLASSES", 3, "INPUT.CROP_SIZE", 64),
    *("MODEL.CLASSIFIER.LABEL_SMOOTHING", 0.1),
]
MODELS = {
    "smooth_l1": [*DETECTOR, "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "smooth_l1"],
    "giou": [*DETECTOR, "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou"],
    "mask_rcnn": [*DETECTOR, *MASK_RCNN],
    "classifier": CLASSIFIER,
}
DTYPES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


def build(name, *others):
    torch.manual_seed(0)
    return dn.build_model(dn.load_config(None, [*COMMON, *MODELS[name], *others]))


def batch(name, dtype, boxes=None):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 64, 64, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]
    targets = []
    for i in range(4):
        corner = torch.rand(2, 2, generator=generator, dtype=torch.float64) * 30
        masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
        masks[:, 10:40, 10:40] = 1
        targets.append(
            {
                "boxes": torch.cat([corner, corner + 16], 1).to(boxes or dtype),
                "labels": torch.tensor(i % 3) if name == "classifier" else torch.tensor([i % 3, 2]),
                "masks": masks,
            }
        )
    return images, targets


def losses_of(model, *data):
    torch.manual_seed(1)
    losses = model(*data)
    total = sum(losses.values())
    total.backward()
    return total.detach().double()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("boxes", [None, torch.float32])
def test_training_and_prediction(name, dtype, boxes):
    model = build(name).to(dtype).train()
    expected = losses_of(build(name).double().train(), *batch(name, torch.float64))
    total = losses_of(model, *batch(name, dtype, boxes))
    torch.testing.assert_close(total, expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == dtype, key
        assert torch.isfinite(parameter.grad).all(), key
    images, _ = batch(name, dtype)
    with torch.no_grad():
        output = model.eval()(images)
    for found in output if name != "classifier" else [{"scores": output}]:
        assert all(torch.isfinite(v).all() for v in found.values() if v.is_floating_point())


@pytest.mark.parametrize("norm", ["BN", "GN", "GhostBN", "SeqNorm", "BGN", "GBGN", "BRN", "IN", "PN"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_norm_of_a_backbone(norm, dtype):
    options = [*("MODEL.BACKBONE.NORM", norm, "MODEL.BACKBONE.NAME", "resnet18", "MODEL.NORM.BGN.NUM_GROUPS", 8)]
    options += ["MODEL.NORM.GHOSTBN.SAMPLES_PER_GROUP", 2, "MODEL.NORM.SEQNORM.NUM_SAMPLE_GROUPS", 2]
    model = build("classifier", *options, "MODEL.NORM.GBGN.SAMPLES_PER_GROUP", 2).to(dtype).train()
    total = losses_of(model, *batch("classifier", dtype))
    assert torch.isfinite(total)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
