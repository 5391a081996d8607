"""Real cases: libraries used as in their documentation, trained for a minute, then audited."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import audit_training as training
import torch
import torchvision
from audit_variants import Given
from torch import Tensor, nn
from torchvision.models import detection, resnet18
from torchvision.models.detection import backbone_utils, faster_rcnn, fcos, mask_rcnn, retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import domainnorm as dn

Objects = tuple[list[Tensor], list[dict[str, Tensor]]]


def objects(count: int, size: int = 128, masks: bool = False, background: bool = False) -> Objects:
    """Images with a square of one of three colors each, small, middle or large, and their targets.

    Args:
        masks: targets have them, and labels begin at 1.
        background: labels begin at 1.
    """
    found, targets = [], []
    for _ in range(count):
        side = size * (1, 3, 8)[int(torch.randint(3, ()))] // 12
        left, top = (int(torch.randint(size - side, ())) for _ in range(2))
        kind = int(torch.randint(3, ()))
        image = torch.rand(3, size, size) * 0.3
        image[kind, top : top + side, left : left + side] += 0.6
        box = torch.tensor([[left, top, left + side, top + side]]).float()
        target = {"boxes": box, "labels": torch.tensor([kind + (masks or background)])}
        if masks:
            target["masks"] = (image[None, kind] > 0.45).to(torch.uint8)
        found.append(image)
        targets.append(target)
    return found, targets


def train_detector(model: nn.Module, batch: int, steps: int, rate: float = 0.01, **options: Any) -> nn.Module:
    """On such images."""

    def batches() -> Any:
        while True:
            images, targets = objects(batch, **options)
            yield lambda model, images=images, targets=targets: sum(model(images, targets).values())

    return training.train(model.train(), batches(), steps, rate)


def pyramid(name: str = "resnet18", **options: Any) -> nn.Module:
    """torchvision's backbone of three levels and two more."""
    options = {"norm_layer": nn.BatchNorm2d, "extra_blocks": LastLevelP6P7(256, 256)} | options
    return backbone_utils.resnet_fpn_backbone(
        backbone_name=name, weights=None, trainable_layers=5, returned_layers=[2, 3, 4], **options
    )


def torchvision_retinanet() -> Given:
    """torchvision's RetinaNet, its head with `norm_layer=nn.BatchNorm2d`."""
    model = detection.RetinaNet(pyramid(), 3, min_size=128, max_size=128)
    model.head = retinanet.RetinaNetHead(
        256, model.anchor_generator.num_anchors_per_location()[0], 3, norm_layer=nn.BatchNorm2d
    )
    for tower in (model.head.classification_head, model.head.regression_head):
        tower.conv = tower.conv[:2]
    return Given(train_detector(model, 4, 120), [objects(8)[0] for _ in range(4)])


def torchvision_fcos() -> Given:
    """torchvision's FCOS, its head with `norm_layer=nn.BatchNorm2d`."""
    model = detection.FCOS(pyramid(), 3, min_size=128, max_size=128)
    model.head.classification_head = fcos.FCOSClassificationHead(256, 1, 3, num_convs=2, norm_layer=nn.BatchNorm2d)
    model.head.regression_head = fcos.FCOSRegressionHead(256, 1, num_convs=2, norm_layer=nn.BatchNorm2d)
    return Given(train_detector(model, 4, 120), [objects(8)[0] for _ in range(4)])


def mask_rcnn_v2() -> Given:
    """The heads of `maskrcnn_resnet50_fpn_v2`, which have BatchNorm, trained with one image a batch."""
    backbone = pyramid(extra_blocks=None, norm_layer=partial(nn.GroupNorm, 32))
    model = detection.MaskRCNN(
        backbone,
        min_size=128,
        max_size=128,
        box_batch_size_per_image=64,
        box_detections_per_img=20,
        rpn_anchor_generator=AnchorGenerator(tuple((s,) for s in (8, 16, 32, 64)), ((1.0,),) * 4),
        box_head=faster_rcnn.FastRCNNConvFCHead((256, 7, 7), [64, 64], [128], norm_layer=nn.BatchNorm2d),
        box_predictor=faster_rcnn.FastRCNNPredictor(128, 4),
        mask_head=mask_rcnn.MaskRCNNHeads(256, [64, 64], 1, norm_layer=nn.BatchNorm2d),
        mask_predictor=mask_rcnn.MaskRCNNPredictor(64, 32, 4),
    )
    train_detector(model, 1, 150, 0.005, masks=True)
    return Given(model, [objects(1, masks=True) for _ in range(16)], {"forward": _images, "loss": _losses})


def _images(model: nn.Module, batch: Objects) -> Any:
    return model(batch[0])


def _losses(model: nn.Module, batch: Objects) -> Any:
    return model(*batch)


def table_5_row_3() -> Given:
    """This library's RetinaNet with `POPULATION_STATISTICS shared`: SGD statistics per level, population shared."""
    options = {
        "MODEL.DEVICE": "cpu", "MODEL.WEIGHTS": "", "MODEL.BACKBONE.NAME": "resnet18", "MODEL.BACKBONE.NORM": "BN",
        "MODEL.BACKBONE.FREEZE_AT": 0, "MODEL.FPN.OUT_CHANNELS": 64, "MODEL.RETINANET.NORM": "BN",
        "MODEL.RETINANET.NUM_CONVS": 2, "MODEL.RETINANET.SGD_STATISTICS": "per_domain",
        "MODEL.RETINANET.POPULATION_STATISTICS": "shared", "MODEL.RETINANET.NUM_CLASSES": 3,
        "INPUT.MIN_SIZE_TRAIN": [128], "INPUT.MAX_SIZE_TRAIN": 128, "INPUT.MIN_SIZE_TEST": 128,
        "INPUT.MAX_SIZE_TEST": 128,
    }  # fmt: skip
    model = dn.build_model(dn.load_config(None, [word for pair in options.items() for word in pair]))
    train_detector(model, 4, 120)
    return Given(model, [objects(8) for _ in range(4)], {"forward": _images, "loss": _losses})


def random_frozen_backbone() -> Given:
    """`resnet_fpn_backbone(weights=None)`, whose default norm is FrozenBatchNorm2d: constants of no weights at all."""
    backbone = backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    anchors = AnchorGenerator(tuple((s,) for s in (8, 16, 32, 64, 128)), ((1.0,),) * 5)
    model = detection.RetinaNet(backbone, 3, min_size=128, max_size=128, anchor_generator=anchors)
    return Given(train_detector(model, 4, 20), [objects(8)[0] for _ in range(4)])


def tiny_momentum() -> Given:
    """torchvision's MNASNet, whose momentum is 0.0003, trained for 200 steps."""
    model = torchvision.models.mnasnet0_5(weights=None, num_classes=training.CLASSES)
    training.train(model, training.classify(32, 64), 200)
    return Given(model, training.batches(8, 32, 64))


def fp16_statistics() -> Given:
    """torchvision's ResNet-18 after `model.half()`, with its inputs so."""
    model = resnet18(weights=None, num_classes=training.CLASSES)
    training.train(model, training.classify(16, 64), 120)
    return Given(copy.deepcopy(model).half(), [x.half() for x in training.batches(8, 16, 64)])


def two_data_sets() -> Given:
    """A ResNet-18 trained on dark and on light images by turns, batch by batch."""
    model = resnet18(weights=None, num_classes=training.CLASSES)
    training.train(model, training.classify(16, 64, lambda step: 0.5 * (step % 2)), 160)
    return Given(model, {"dark": training.batches(4, 16, 64), "light": training.batches(4, 16, 64, 0.5)})


REAL: dict[str, Callable[[], Given]] = {
    "RetinaNet of torchvision, BatchNorm in its head": torchvision_retinanet,
    "FCOS of torchvision, BatchNorm in its head": torchvision_fcos,
    "Mask R-CNN v2 heads, one image a batch": mask_rcnn_v2,
    "Table 5, row 3": table_5_row_3,
    "a backbone frozen with random statistics": random_frozen_backbone,
    "statistics that never arrive": tiny_momentum,
    "float16 statistics": fp16_statistics,
    "two data sets in one BatchNorm": two_data_sets,
}
