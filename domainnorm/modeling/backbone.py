"""Backbones with a chosen norm, under a feature pyramid."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torchvision
from fvcore.common.config import CfgNode
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from ..config.schema.model import BACKBONES
from ..errors import UserError
from ..layers import get_norm
from ..surgery.freeze import freeze_batchnorm
from .bodies import STRIDES, Body, timm_body, torchvision_body
from .norm import norm_options, with_norm
from .pyramid import Backbone, ConvolvedLevels, SubsampledLevels


def build_backbone(cfg: CfgNode) -> Backbone:
    """`MODEL.FPN.NUM_LEVELS` levels of `MODEL.FPN.OUT_CHANNELS` channels, as detectron2.

    RetinaNet: from P3 on (strides 8, 16, …), P6 and those above by convolutions. GeneralizedRCNN: from P2 on (strides
    4, 8, …), those above P5 by subsampling. State-dict keys are torchvision's (`body.…`, `fpn.…`).
    """
    channels, number = cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NUM_LEVELS
    dense = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    strides = STRIDES[dense:][:number]
    body, positions = _body(cfg, strides)
    above = number - len(strides)
    extra: ExtraFPNBlock | None = None
    if above and dense:
        extra = ConvolvedLevels(body.channels[-1] if cfg.MODEL.FPN.P6_FROM == "c5" else 0, channels, above)
    elif above:
        extra = SubsampledLevels(above)
    return Backbone(
        body.module,
        body.channels,
        channels,
        positions=positions,
        extra=extra,
        norm_layer=(
            partial(get_norm, cfg.MODEL.FPN.NORM, **norm_options(cfg, cfg.MODEL.FPN.NORM))
            if cfg.MODEL.FPN.NORM
            else None
        ),
    )


def _body(cfg: CfgNode, strides: tuple[int, ...]) -> tuple[Body, list[int]]:
    """The body, and the positions of its maps where it returns a list."""
    name, norm, frozen = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.NORM, cfg.MODEL.BACKBONE.FREEZE_AT
    options = norm_options(cfg, norm)
    if name.startswith("timm/"):
        body, positions = timm_body(name.removeprefix("timm/"), strides)
    else:
        positions = []
        own = name in BACKBONES
        make = _mobilenet if name.startswith("mobilenet") else _resnet
        body = make(name, norm, options, strides) if own else torchvision_body(name, strides)
    if name not in BACKBONES:
        with_norm(body.module, norm, options, name)
    if cfg.MODEL.BACKBONE.STRIDE_IN_1X1:
        _stride_in_1x1(name, body.module)
    if frozen and not body.stages:
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT {frozen} contradicts NAME {name!r}, whose stages are not known: set it to 0"
        )
    _freeze(body.module, body.stages[:frozen])
    return body, positions


def _resnet(name: str, norm: str, options: dict[str, Any], strides: tuple[int, ...]) -> Body:
    body = getattr(torchvision.models, name)(norm_layer=_norm_or_identity(norm, options))
    stages = [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]
    width = body.inplanes  # of layer4
    return _with_outputs(body, stages, {4 << i: (f"layer{i + 1}", width >> (3 - i)) for i in range(4)}, strides)


def _stride_in_1x1(name: str, body: nn.Module) -> None:
    """Bottlenecks that halve the resolution do it in their first convolution, as in the weights of MSRA."""
    blocks = [block for block in body.modules() if isinstance(block, Bottleneck)]
    if not blocks:
        raise UserError(
            f"MODEL.BACKBONE.STRIDE_IN_1X1 contradicts NAME {name!r}, which has no bottlenecks: set it to False"
        )
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _mobilenet(name: str, norm: str, options: dict[str, Any], strides: tuple[int, ...]) -> Body:
    # eps and momentum of the paper, with which the published weights were trained
    options = {"eps": 0.001, "momentum": 0.01} | options
    body = getattr(torchvision.models, name)(norm_layer=_norm_or_identity(norm, options)).features
    # A stage ends before the next block with stride 2; the first block is the stem.
    ends = [i - 1 for i, block in enumerate(body) if getattr(block, "_is_cn", False)] + [len(body) - 1]
    starts = [0] + [end + 1 for end in ends[:-1]]
    stages = [[str(i) for i in range(a, b + 1)] for a, b in zip(starts, ends, strict=True)]
    outputs = {4 << k: (str(i), body[i].out_channels) for k, i in enumerate(ends[-4:])}
    return _with_outputs(body, stages, outputs, strides)


def _with_outputs(
    body: nn.Module, stages: list[list[str]], outputs: dict[int, tuple[str, int]], strides: tuple[int, ...]
) -> Body:
    """A body with the outputs of `strides`. `outputs`: for each stride, the child and its number of channels."""
    names = {outputs[stride][0]: str(k) for k, stride in enumerate(strides)}
    getter = IntermediateLayerGetter(body, return_layers=names)
    there = [[name for name in stage if name in getter] for stage in stages]
    return Body(getter, there, [outputs[stride][1] for stride in strides])


def _norm_or_identity(norm: str, options: dict[str, Any]) -> Callable[[int], nn.Module]:
    return lambda channels: get_norm(norm, channels, **options) or nn.Identity()


def _freeze(body: nn.Module, stages: list[list[str]]) -> None:
    """Constant weights, and BatchNorms as FrozenBatchNorm, in the given stages."""
    for name in (name for stage in stages for name in stage):
        parent, _, own = name.rpartition(".")
        child = freeze_batchnorm(body.get_submodule(name))
        setattr(body.get_submodule(parent), own, child)
        child.requires_grad_(False)
