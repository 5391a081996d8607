"""torchvision backbones with a chosen norm, under a feature pyramid."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torchvision
from fvcore.common.config import CfgNode
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import Bottleneck
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ..errors import UserError
from ..layers import get_norm
from ..surgery.freeze import freeze_batchnorm
from .norm import norm_options


def build_backbone(cfg: CfgNode) -> BackboneWithFPN:
    """Five levels of `MODEL.FPN.OUT_CHANNELS` channels, as detectron2.

    RetinaNet: P3 to P7 (strides 8 to 128), P6 and P7 by convolutions from C5. GeneralizedRCNN: P2 to P6 (strides 4 to
    64), P6 by subsampling P5. State-dict keys are torchvision's (`body.…`, `fpn.…`).
    """
    name, norm = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.NORM
    body, stages, outputs = (_mobilenet if name.startswith("mobilenet") else _resnet)(
        name, norm, norm_options(cfg, norm)
    )
    if cfg.MODEL.BACKBONE.STRIDE_IN_1X1:
        _stride_in_1x1(name, body)
    _freeze(body, stages[: cfg.MODEL.BACKBONE.FREEZE_AT])
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    dense = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    layers, widths = list(outputs)[dense:], list(outputs.values())[dense:]
    return BackboneWithFPN(
        body,
        return_layers={layer: str(i) for i, layer in enumerate(layers)},
        in_channels_list=widths,
        out_channels=channels,
        extra_blocks=LastLevelP6P7(widths[-1], channels) if dense else LastLevelMaxPool(),
        norm_layer=(
            partial(get_norm, cfg.MODEL.FPN.NORM, **norm_options(cfg, cfg.MODEL.FPN.NORM))
            if cfg.MODEL.FPN.NORM
            else None
        ),
    )


# Each returns the body, the names of its children stage by stage (stem first), and the children whose outputs have
# strides 4, 8, 16 and 32 with their channels.
_Body = tuple[nn.Module, list[list[str]], dict[str, int]]


def _resnet(name: str, norm: str, options: dict[str, Any]) -> _Body:
    body = getattr(torchvision.models, name)(norm_layer=_norm_or_identity(norm, options))
    stages = [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]
    width = body.inplanes  # of layer4
    return body, stages, {f"layer{i}": width >> (4 - i) for i in range(1, 5)}


def _stride_in_1x1(name: str, body: nn.Module) -> None:
    """Bottlenecks that halve the resolution do it in their first convolution, as in the weights of MSRA."""
    blocks = [block for block in body.modules() if isinstance(block, Bottleneck)]
    if not blocks:
        raise UserError(
            f"MODEL.BACKBONE.STRIDE_IN_1X1 contradicts NAME {name!r}, which has no bottlenecks: set it to False"
        )
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _mobilenet(name: str, norm: str, options: dict[str, Any]) -> _Body:
    # eps and momentum of the paper, with which the published weights were trained
    options = {"eps": 0.001, "momentum": 0.01} | options
    body = getattr(torchvision.models, name)(norm_layer=_norm_or_identity(norm, options)).features
    # A stage ends before the next block with stride 2; the first block is the stem.
    ends = [i - 1 for i, block in enumerate(body) if getattr(block, "_is_cn", False)] + [len(body) - 1]
    starts = [0] + [end + 1 for end in ends[:-1]]
    stages = [[str(i) for i in range(a, b + 1)] for a, b in zip(starts, ends, strict=True)]
    return body, stages, {str(i): body[i].out_channels for i in ends[-4:]}


def _norm_or_identity(norm: str, options: dict[str, Any]) -> Callable[[int], nn.Module]:
    return lambda channels: get_norm(norm, channels, **options) or nn.Identity()


def _freeze(body: nn.Module, stages: list[list[str]]) -> None:
    """Constant weights, and BatchNorms as FrozenBatchNorm, in the given stages."""
    for name in (name for stage in stages for name in stage):
        child = freeze_batchnorm(body.get_submodule(name))
        body.add_module(name, child)
        child.requires_grad_(False)
