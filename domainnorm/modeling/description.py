"""What a model is, in plain values: in its checkpoints, in files exported from it, and as an attribute of itself."""

import sys
from typing import Any

import torch
import torchvision
from fvcore.common.config import CfgNode
from torch import nn

from ..config.node import get_value
from ..config.schema.model import NUM_CLASSES
from ..data import domain_names
from ..errors import UserError, cut, quote

_LIBRARY = sys.modules[__name__.partition(".")[0]]


def describe_model(cfg: CfgNode, model: nn.Module | None = None) -> dict[str, Any]:
    """Classes, domains, the size of images in inference, normalization of pixels and versions of the model of `cfg`,
    whose classes `data.classes.with_classes` has filled in.

    In types that JSON and `torch.load(weights_only=True)` know. Class k has the k-th of `class_names`, which are empty
    where nothing says what classes are called.

    Args:
        model: another one than `build_model` makes is called by its class.
    """
    is_built = model is None or hasattr(model, "description")
    classifier = cfg.MODEL.META_ARCHITECTURE == "Classifier"
    sizes = {"min_size": cfg.INPUT.MIN_SIZE_TEST, "max_size": cfg.INPUT.MAX_SIZE_TEST}
    return {
        "architecture": cfg.MODEL.META_ARCHITECTURE if is_built else type(model).__name__,
        "num_classes": get_value(cfg, NUM_CLASSES[cfg.MODEL.META_ARCHITECTURE]),
        "class_names": list(cfg.MODEL.CLASS_NAMES),
        "domains": domain_names(cfg),
        **({"crop_size": cfg.INPUT.CROP_SIZE} if classifier else sizes),
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "versions": {
            "domainnorm": _LIBRARY.__version__,
            "torch": str(torch.__version__),
            "torchvision": torchvision.__version__,
        },
    }


def check_architecture(content: dict[str, Any], source: object) -> None:
    """UserError if a checkpoint is of a model that was given to `dn.train`, which no config builds."""
    description = content.get("description")
    architecture = description.get("architecture") if isinstance(description, dict) else None
    if architecture is not None and architecture not in NUM_CLASSES:
        raise UserError(
            f"checkpoint {source}: holds the weights of the {cut(str(architecture))} that was given to dn.train, and "
            "no config builds that: build it, load what is under 'model', and call dn.evaluate(cfg, model)"
        )


def class_names_in(content: dict[str, Any], source: object) -> list[str]:
    """The names of the classes by the description in a checkpoint; [] where it has none.

    Raises:
        UserError: what is there are no names.
    """
    description = content.get("description")
    names = description.get("class_names", []) if isinstance(description, dict) else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"checkpoint {source}: broken: expected a list of names of classes, got {quote(names)}")
    return names
