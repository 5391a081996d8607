"""Models of many families without faults, briefly trained: the audit must be silent about each."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import audit_training as training
import timm
import torch
import torchvision
from audit_real import objects, pyramid, train_detector
from audit_variants import Given, norms_of
from torch import nn
from torchvision.models import densenet, detection, segmentation
from torchvision.models.detection.anchor_utils import AnchorGenerator

import domainnorm as dn

STEPS = 160  # of training


def classifier(
    build: Callable[[], nn.Module], batch: int = 16, size: int = 64, steps: int | None = None, falls: bool = True
) -> Given:
    """With a momentum of 0.1, whatever is the model's own.

    With torchvision's of MobileNetV3, 0.01, or of MNASNet, 0.0003, the statistics do not arrive in so few steps.
    """
    model = _with_momentum(build())
    training.train(model, training.classify(batch, size), steps or STEPS, falls=falls)
    return Given(model, training.batches(8, batch, size))


def _with_momentum(model: nn.Module) -> nn.Module:
    for _, layer in norms_of(model):
        layer.momentum = 0.1  # type: ignore[assignment]
    return model


def _torchvision(name: str, **options: Any) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, num_classes=training.CLASSES, **options)


def _timm(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=training.CLASSES, **options)


def _perceptron() -> nn.Module:
    """With BatchNorm1d."""
    widths = (3 * 16 * 16, 128, 128, 64)
    hidden = [(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(nn.Flatten(), *(m for block in hidden for m in block), nn.Linear(64, training.CLASSES))


def _ghost() -> nn.Module:
    """torchvision's ResNet-18 in ghost batches of 8."""
    return dn.convert_batchnorm(_torchvision("resnet18"), "GhostBatchNorm", samples_per_group=8)


def _fcos() -> Given:
    """torchvision's FCOS as it is: BatchNorm in the backbone, GroupNorm in the shared head."""
    model = detection.FCOS(pyramid(), 3, min_size=64, max_size=64)
    train_detector(model, 8, 120, size=64)
    return Given(model, [objects(8, 64)[0] for _ in range(8)])


def _faster_rcnn() -> Given:
    """torchvision's Faster R-CNN whose BatchNorms, all in the backbone, are frozen for the last steps of training."""
    anchors = AnchorGenerator(tuple((s,) for s in (8, 16, 32, 64)), ((1.0,),) * 4)
    options = {"min_size": 64, "max_size": 64, "box_batch_size_per_image": 32, "rpn_anchor_generator": anchors}
    model = detection.FasterRCNN(pyramid(extra_blocks=None), 4, **options)
    train_detector(model, 4, 100, size=64, background=True)
    dn.freeze_batchnorm(model)
    train_detector(model, 4, 20, 1e-3, size=64, background=True)
    return Given(model, [objects(8, 64)[0] for _ in range(8)])


def _lraspp() -> nn.Module:
    return segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=training.CLASSES)


def _densenet() -> nn.Module:
    return densenet.DenseNet(12, (3, 4, 4), 24, num_classes=training.CLASSES)


SOUND: dict[str, Callable[[], Given]] = {
    "perceptron": partial(classifier, _perceptron, 32, 16),
    "vit_tiny of timm": partial(
        classifier, partial(_timm, "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2), size=32, steps=20
    ),
    "resnet18": partial(classifier, partial(_torchvision, "resnet18")),
    "resnet10t of timm": partial(classifier, partial(_timm, "resnet10t")),
    "resnet10t of timm, in mid-training": partial(classifier, partial(_timm, "resnet10t"), falls=False),
    "mobilenet_v2": partial(classifier, partial(_torchvision, "mobilenet_v2")),
    "mobilenet_v3_small": partial(classifier, partial(_torchvision, "mobilenet_v3_small"), 32),
    "mnasnet0_5": partial(classifier, partial(_torchvision, "mnasnet0_5"), 32),
    "efficientnet_b0": partial(classifier, partial(_torchvision, "efficientnet_b0")),
    "efficientnet_lite0 of timm": partial(classifier, partial(_timm, "efficientnet_lite0")),
    "densenet": partial(classifier, _densenet, 8),
    "regnet_x_400mf": partial(classifier, partial(_torchvision, "regnet_x_400mf")),
    "shufflenet_v2_x0_5": partial(classifier, partial(_torchvision, "shufflenet_v2_x0_5"), 32),
    "googlenet": partial(classifier, partial(_torchvision, "googlenet", aux_logits=False, init_weights=False)),
    "dla34 of timm": partial(classifier, partial(_timm, "dla34"), 8, steps=120),
    "resnet18 in ghost batches": partial(classifier, _ghost, 32),
    "lraspp_mobilenet_v3_large": partial(classifier, _lraspp),
    "fcos, BatchNorm and GroupNorm": _fcos,
    "fasterrcnn, frozen BatchNorm": _faster_rcnn,
}


def sound(name: str, seed: int = 0) -> Given:
    """One of them, trained."""
    torch.manual_seed(seed)
    return SOUND[name]()
