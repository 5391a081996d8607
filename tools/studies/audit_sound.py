"""Models of many families with nothing wrong, trained a little: the audit has to be silent about each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import audit_training as training
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import densenet, detection, segmentation
from torchvision.ops import FrozenBatchNorm2d


@dataclass(frozen=True)
class Sound:
    """A model, how it is trained, and the batches that it is audited with.

    Attributes:
        build: makes the model.
        batch, size: of the images.
        steps: of training.
    """

    build: Callable[[], nn.Module]
    batch: int = 16
    size: int = 32
    steps: int = 80
    rate: float = 0.02

    def given(self, seed: int = 0) -> tuple[nn.Module, list[Any]]:
        torch.manual_seed(seed)
        model = self.build()
        training.train(model, training.classify(self.batch, self.size), self.steps, self.rate)
        return model, training.batches(8, self.batch, self.size)


def _torchvision(name: str, **options: Any) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, num_classes=training.CLASSES, **options)


def _timm(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=training.CLASSES, **options)


class Flat(nn.Sequential):
    """A perceptron with BatchNorm1d."""

    def __init__(self) -> None:
        layers = [nn.Flatten()]
        for width in (3 * 16 * 16, 128, 64):
            layers += [nn.LazyLinear(128), nn.BatchNorm1d(128), nn.ReLU()]
        super().__init__(*layers, nn.Linear(128, training.CLASSES))
        self(torch.zeros(2, 3, 16, 16))


SOUND: dict[str, Sound] = {
    "resnet18": Sound(partial(_torchvision, "resnet18"), size=64),
    "mobilenet_v3_small": Sound(partial(_torchvision, "mobilenet_v3_small"), size=64, batch=32),
    "mobilenet_v2": Sound(partial(_torchvision, "mobilenet_v2"), size=64, batch=16),
    "efficientnet_b0": Sound(partial(_torchvision, "efficientnet_b0"), size=64, batch=16),
    "densenet": Sound(
        lambda: densenet.DenseNet(12, (3, 4, 4), 24, num_classes=training.CLASSES), size=64, batch=8
    ),
    "regnet_x_400mf": Sound(partial(_torchvision, "regnet_x_400mf"), size=64, batch=16),
    "shufflenet_v2_x0_5": Sound(partial(_torchvision, "shufflenet_v2_x0_5"), size=64, batch=32),
    "googlenet": Sound(partial(_torchvision, "googlenet", aux_logits=False, init_weights=False), size=64, batch=16),
    "mnasnet0_5": Sound(partial(_torchvision, "mnasnet0_5"), size=64, batch=32),
    "timm resnet10t": Sound(partial(_timm, "resnet10t"), size=64),
    "timm efficientnet_lite0": Sound(partial(_timm, "efficientnet_lite0"), size=64),
    "timm dla34": Sound(partial(_timm, "dla34"), size=64),
    "timm convnext_atto": Sound(partial(_timm, "convnext_atto"), size=64),
    "perceptron": Sound(Flat, size=16, batch=32),
    "vit": Sound(partial(_timm, "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2), size=32),
    "lraspp": Sound(
        lambda: segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4), size=64
    ),
}
