"""Give torchvision's FCOS, whose head is shared by the pyramid levels, a BatchNorm with statistics of each level.

    python examples/fcos_levels.py [--steps 250] [--out output/fcos_levels]

The towers of the head become `dn.DomainSequential`, and take the list of levels instead of one level after the other. A
list says which tensor is of which domain: nothing is counted, and a layer that is synchronized (`sync=True`) has one
collective for all levels. After training, AP is compared with that of the same weights under one set of population
statistics for all levels, which is what `nn.BatchNorm2d` in this head has (*Rethinking "Batch"*, Table 5, row 3).
"""

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import domainnorm as dn

CLASSES = ["disk", "square", "triangle", "ring"]
LEVELS = 5


def fcos(affine: str = "shared") -> FCOS:
    """A small one, from random weights; `affine="per_domain"` also gives each level its own γ and β, as in RTMDet."""
    features = {f"layer{k + 1}": str(k) for k in range(4)}
    backbone = BackboneWithFPN(resnet18(), features, [64, 128, 256, 512], 64, LastLevelMaxPool(), nn.BatchNorm2d)
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * LEVELS)
    model = FCOS(backbone, len(CLASSES), anchor_generator=anchors, min_size=128, max_size=160)
    norm: Any = partial(dn.DomainBatchNorm, num_domains=LEVELS, affine=affine)
    model.head.classification_head = FCOSClassificationHead(64, 1, len(CLASSES), 2, norm_layer=norm)
    model.head.regression_head = FCOSRegressionHead(64, 1, 2, norm_layer=norm)
    for head in (model.head.classification_head, model.head.regression_head):
        head.tower, head.conv = dn.DomainSequential(*head.conv), nn.Identity()
        head.register_forward_pre_hook(tower_first)
    return model


def tower_first(head: Any, args: tuple[list[Tensor]]) -> tuple[list[Tensor]]:
    """All levels go through the tower together; torchvision's forward then does the rest, level by level."""
    return (head.tower(args[0]),)


def shared_statistics(model: FCOS) -> FCOS:
    """A copy whose levels share one set of population statistics, in `nn.BatchNorm2d`: the moments of their union."""
    return dn.convert_batchnorm(dn.merge_domains(copy.deepcopy(model)), "BatchNorm2d")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """AP with statistics of each level and with shared ones, in percent."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--out", default="output/fcos_levels")
    args = parser.parse_args(argv)
    options = ["SOLVER.MAX_ITER", args.steps, "OUTPUT_DIR", args.out, "MODEL.CLASS_NAMES", CLASSES]
    cfg = dn.load_config("quickstart.yaml", [*options, "TEST.STATISTICS", ["population"]])
    torch.manual_seed(0)
    model = dn.train(dn.load_config("quickstart.yaml", [*options, "DATASETS.TEST", []]), model=fcos()).eval()
    found = {}
    for name, candidate in (("each level", model), ("all levels", shared_statistics(model))):
        found[name] = dn.evaluate(cfg, candidate)["population"]["bbox"]["AP"]
    print(", ".join(f"AP {value:.1f} with population statistics of {name}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main()
