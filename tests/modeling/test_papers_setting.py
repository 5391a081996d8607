"""The parts of detectron2's baselines that differ from torchvision's, by config keys."""

import pytest
import torch
import torch.nn.functional as F
from test_mask_rcnn import batch, build
from test_retinanet import tiny
from torchvision.models import resnet50

import domainnorm as dn


def test_anchors_are_not_rounded():
    """detectron2's DefaultAnchorGenerator: w = sqrt(size² / ratio), h = ratio · w, around 0."""
    sizes = [32, 64, 128, 256, 512]
    exact, rounded = (
        tiny("MODEL.ANCHOR_GENERATOR.SIZES", sizes, "MODEL.ANCHOR_GENERATOR.ROUNDED", value).anchor_generator
        for value in (False, True)
    )
    for size, found, whole in zip(sizes, exact.cell_anchors, rounded.cell_anchors, strict=True):
        expected = []
        for ratio in (0.5, 1.0, 2.0):
            for scale in range(3):
                area = (size * 2 ** (scale / 3)) ** 2
                width = (area / ratio) ** 0.5
                expected.append([-width / 2, -width * ratio / 2, width / 2, width * ratio / 2])
        torch.testing.assert_close(found, torch.tensor(expected))
        assert torch.equal(whole, whole.round()) and (whole - found).abs().max() < 1.5


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_box_losses_of_rpn_and_head_turn_linear_at_beta(beta, monkeypatch):
    keys = {"MODEL.RPN.SMOOTH_L1_BETA": beta, "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": beta}
    model = build("BN", **{key.replace(".", "__"): value for key, value in keys.items()})
    seen, smooth_l1 = [], F.smooth_l1_loss
    monkeypatch.setattr(F, "smooth_l1_loss", lambda *a, **k: seen.append(k["beta"]) or smooth_l1(*a, **k))
    model.train()(*batch(2, 1))
    assert seen == [beta] * 2
    x = torch.linspace(-2, 2, 9)
    assert beta or torch.equal(smooth_l1(x, 0 * x, beta=0.0, reduction="sum"), x.abs().sum())


def test_poolers_of_both_heads():
    keys = {f"MODEL__ROI_{head}_HEAD__POOLER_TYPE": "ROIAlignV2" for head in ("BOX", "MASK")}
    model = build("BN", **keys, MODEL__ROI_MASK_HEAD__POOLER_SAMPLING_RATIO=0)
    pools = (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool)
    assert [(pool.aligned, pool.sampling_ratio) for pool in pools] == [(True, 2), (True, 0)]
    losses = model.train()(*batch(2, 1))
    assert all(loss.isfinite() for loss in losses.values())


def test_the_stride_in_the_first_convolution_of_a_bottleneck():
    keys = ["MODEL.RETINANET.NUM_CLASSES", 2, "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.BACKBONE.NORM", "BN"]
    body = dn.build_model(dn.load_config(None, [*keys, "MODEL.BACKBONE.STRIDE_IN_1X1", True])).backbone.body
    usual = resnet50()
    for name in ("layer2", "layer3", "layer4"):
        ours, theirs = getattr(body, name)[0], getattr(usual, name)[0]
        assert (ours.conv1.stride, ours.conv2.stride) == (theirs.conv2.stride, theirs.conv1.stride) == ((2, 2), (1, 1))
    x = torch.rand(1, 3, 64, 64)
    assert [tuple(y.shape[2:]) for y in body(x).values()] == [(8, 8), (4, 4), (2, 2)]
    with pytest.raises(dn.UserError, match="STRIDE_IN_1X1 contradicts NAME 'resnet18'"):
        tiny("MODEL.BACKBONE.STRIDE_IN_1X1", True, "MODEL.BACKBONE.NAME", "resnet18")


def test_the_papers_configs_have_them():
    box = dn.load_config("paper/table3_6/shuffle_1_image.yaml")
    assert (box.MODEL.ROI_BOX_HEAD.POOLER_TYPE, box.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO) == ("ROIAlignV2", 0)
    assert (box.MODEL.RPN.SMOOTH_L1_BETA, box.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA, box.SOLVER.ACCUMULATE) == (0, 0, 1)
    assert not dn.load_config("paper/table5/row1.yaml").MODEL.ANCHOR_GENERATOR.ROUNDED
