"""Find out why a model of torchvision has an AP of nearly 0 although its loss is fine, and repair it.

    python examples/audit_foreign_model.py [--steps 250] [--out output/audit_foreign_model]

An FCOS whose head has `nn.BatchNorm2d` instead of torchvision's GroupNorm. The head is shared by the levels of the
pyramid, so each norm is called once for each level: in training every level is normalized by its own statistics, in
inference all by one average of them. `dn.audit` names these layers, and `score` says what each remedy is worth, with
no training. Then the head gets statistics for each level, recomputed from the training images.
"""

import argparse
import contextlib
import io
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import domainnorm as dn
from domainnorm.data.loader import train_loader

CLASSES = ["disk", "square", "triangle", "ring"]
LEVELS = 5


def fcos() -> FCOS:
    """A small one, from random weights."""
    features = {f"layer{k + 1}": str(k) for k in range(4)}
    backbone = BackboneWithFPN(
        resnet18(norm_layer=nn.BatchNorm2d), features, [64, 128, 256, 512], 64, LastLevelMaxPool(), nn.BatchNorm2d
    )
    model = FCOS(
        backbone,
        num_classes=len(CLASSES),
        anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * LEVELS),
        min_size=128,
        max_size=160,
    )
    channels = backbone.out_channels
    model.head.classification_head = FCOSClassificationHead(channels, 1, len(CLASSES), 2, norm_layer=nn.BatchNorm2d)
    model.head.regression_head = FCOSRegressionHead(channels, 1, 2, norm_layer=nn.BatchNorm2d)
    return model


class HeadOfLevels(nn.Module):
    """A head of torchvision that says which level it is given.

    Args:
        head: takes a list of features, and returns a dict of tensors that go through all levels in dimension 1.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = dn.convert_batchnorm(head, "DomainBatchNorm", num_domains=LEVELS)
        self.compute_loss = head.compute_loss

    def forward(self, levels: list[Tensor]) -> dict[str, Tensor]:
        outputs = []
        for k, level in enumerate(levels):
            with dn.use_domain(self.head, k):
                outputs.append(self.head([level]))
        return {name: torch.cat([output[name] for output in outputs], 1) for name in outputs[0]}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """AP before and after the repair, in percent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--out", default="output/audit_foreign_model")
    args = parser.parse_args(argv)
    options = ["SOLVER.MAX_ITER", args.steps, "OUTPUT_DIR", args.out, "MODEL.CLASS_NAMES", CLASSES]
    cfg = dn.load_config("quickstart.yaml", [*options, "TEST.STATISTICS", ["population"]])
    torch.manual_seed(0)
    model = dn.train(dn.load_config("quickstart.yaml", [*options, "DATASETS.TEST", []]), model=fcos()).eval()

    def score(model: nn.Module) -> float:
        with contextlib.redirect_stdout(io.StringIO()):  # its table
            return dn.evaluate(cfg, model)["population"]["bbox"]["AP"]

    loader = train_loader(cfg, rank=0, world_size=1)
    batches = [images for images, targets in itertools.islice(loader, 8)]
    report = dn.audit(model, batches, score=score)
    print(report)

    model.head = HeadOfLevels(model.head)
    norms = [layer for layer in model.head.modules() if isinstance(layer, dn.DomainBatchNorm)]
    dn.recompute_population_statistics(model, batches, as_in_inference=norms)
    found = {"before": report.scores[0]["score"], "after": score(model)}
    print(f"AP {found['before']:.1f}; with population statistics of each level {found['after']:.1f}")
    return found


if __name__ == "__main__":
    main()
