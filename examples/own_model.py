"""Train torchvision's Faster R-CNN with this library: own model, own transforms, a hook, AP under each statistics.

    python examples/own_model.py [--iterations 600] [--out output/own_model]

What `dn.train` needs of a model: in training mode `model(images, targets)` is a dict of losses, in eval mode
`model(images)` a list of dicts of boxes, labels and scores. The data are the built-in shapes; `train_data=` takes any
data set of `(image, target)` instead of `DATASETS.TRAIN`.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.transforms import v2

import domainnorm as dn

# Labels are places in this list: torchvision's R-CNNs have background for 0. RetinaNet and FCOS count from 0.
CLASSES = ["background", "disk", "square", "triangle", "ring"]


class Progress(dn.HookBase):
    """As a hook of detectron2: `self.trainer` is the run."""

    def before_train(self) -> None:
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        print(f"training {sum(p.numel() for p in parameters):,} parameters")

    def after_step(self) -> None:
        weights = self.trainer.model.roi_heads.box_predictor.cls_score.weight
        self.trainer.put_scalar("norm_of_class_weights", weights.detach().norm())  # into the log, and TensorBoard


def report_losses(trainer: Any) -> None:
    """A function is called after each step."""
    if trainer.iter % 100 == 0:
        print(trainer.iter, {name: round(value, 3) for name, value in trainer.losses.items()})


def faster_rcnn() -> FasterRCNN:
    """A small one, from random weights."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(((12,), (24,), (44,), (72,), (100,)), ((0.5, 1.0, 2.0),) * 5),
        box_head=TwoMLPHead(backbone.out_channels * 7 * 7, 256),
        box_predictor=FastRCNNPredictor(256, len(CLASSES)),
        box_batch_size_per_image=64,
        rpn_pre_nms_top_n_train=300,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_test=100,
        min_size=128,
        max_size=160,
    )


def train_transforms() -> v2.Transform:
    """Transform an image and its target. torch is seeded for each sample, so that a resumed run is the same."""
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomPhotometricDistort(p=0.3),
            v2.SanitizeBoundingBoxes(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """AP of each statistics, in percent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--out", default="output/own_model")
    args = parser.parse_args(argv)
    options = [
        *("MODEL.CLASS_NAMES", CLASSES, "DATASETS.LABELS", "union"),
        *("SOLVER.MAX_ITER", args.iterations, "OUTPUT_DIR", args.out),
    ]
    cfg = dn.load_config("quickstart.yaml", options)
    torch.manual_seed(0)
    model = faster_rcnn()
    dn.convert_batchnorm(model, "DomainBatchNorm")  # so that statistics can be chosen, and are merged over processes
    without_test = dn.load_config("quickstart.yaml", [*options, "DATASETS.TEST", []])  # it comes below
    model = dn.train(without_test, model=model, transforms=train_transforms(), hooks=[Progress(), report_losses])
    results = dn.evaluate(cfg, model, statistics=["population", "minibatch"])
    return {name: result["bbox"]["AP"] for name, result in results.items()}


if __name__ == "__main__":
    main()
