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
    theirs = getattr(detection, name)(weights=None, weights_backbone=None, **SMALL, **{threshold: 0.01})
    if "v2" not in name:
        replace_layers(theirs, as_with_weights)
    shaken(theirs, torch.rand(3, 120, 90))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    cfg = dn.load_config(
        ROOT / f"configs/finetune/{config}.yaml",
        [
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(tmp_path / "theirs.pth"), f"MODEL.{node}.NUM_CLASSES", classes),
            *("INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 160, f"MODEL.{node}.SCORE_THRESH_TEST", 0.01),
        ],
    )
    ours = dn.build_model(cfg, trained=True).eval()
    images = [torch.rand(3, 120, 90), torch.rand(3, 70, 110)]
    with torch.no_grad():
        expected, found = [theirs([image])[0] for image in images], ours(images)
    for one, other in zip(expected, found, strict=True):
        assert len(one["labels"]) > 50 and len(one["labels"].unique()) > 3
        order = torch.cdist(one["boxes"], other["boxes"]).argmin(1)  # two of one score may come in either order
        assert len(order.unique()) == len(order) == len(other["boxes"])
        other = {key: value[order] for key, value in other.items()}
        assert torch.equal(one["labels"], other["labels"] + (0 if node == "RETINANET" else 1))
        torch.testing.assert_close(other["scores"], one["scores"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(other["boxes"], one["boxes"], atol=1e-3, rtol=1e-4)
        assert ("masks" in one) == ("masks" in other) == ("mask" in name)
        if "masks" in one:
            torch.testing.assert_close(other["masks"], one["masks"], atol=1e-4, rtol=1e-4)
