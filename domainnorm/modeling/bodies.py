"""Feature maps of any classifier of torchvision or timm, at strides 4, 8, 16 and 32."""

import difflib
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from ..errors import UserError

STRIDES = (4, 8, 16, 32)
_SIDE = 128  # of the image by which maps are found, which is 1.5 times as wide
_CONTAINERS = ("features", "layers", "trunk_output")  # of torchvision's models: their children are run one by one


class Body(NamedTuple):
    """A module that computes maps, and what is known of them.

    Args:
        stages: the names of its children stage by stage (strides 2, 4, 8, …); []: not known.
        channels: of each map, finest first.
    """

    module: nn.Module
    stages: list[list[str]]
    channels: list[int]


class Chain(nn.Module):
    """Children of a model, one after the other; the outputs of some of them by name. State-dict keys are the model's.

    Args:
        model: whose other children are left out.
        names: of the children, in order; with a dot those of a child.
        outputs: the name of each output, by the child that it is of.
        channels_last: children whose outputs are `(N, H, W, C)`, as in Swin transformers.
    """

    def __init__(self, model: nn.Module, names: list[str], outputs: dict[str, str], channels_last: set[str]) -> None:
        super().__init__()
        for top in dict.fromkeys(name.partition(".")[0] for name in names):
            child = model.get_submodule(top)
            for inner in [inner for inner, _ in child.named_children() if top not in names]:
                if f"{top}.{inner}" not in names:
                    delattr(child, inner)
            self.add_module(top, child)
        self.names = names
        self.outputs = outputs
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Images `(N, 3, H, W)` -> maps `(N, C, H / stride, W / stride)`."""
        found = OrderedDict()
        for name in self.names:
            x = self.get_submodule(name)(x)
            if name in self.outputs:
                found[self.outputs[name]] = x.permute(0, 3, 1, 2) if name in self.channels_last else x
        return found


def torchvision_body(name: str, strides: tuple[int, ...]) -> Body:
    """The body of a model of torchvision whose children run one after the other: all but vision transformers.

    Raises:
        UserError: unknown name, or it has no map of each of the strides.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UserError(
            f"MODEL.BACKBONE.NAME {name}: a detector takes a name of torchvision.models, or timm/NAME; the nearest "
            f"name is {nearest}"
        )
    plain = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **plain)
    maps = _maps(model)
    last = {feature.stride: feature for feature in maps}  # the last one of each stride
    _check_strides(name, strides, list(last))
    outputs = {last[stride].name: str(k) for k, stride in enumerate(strides)}
    channels_last = {last[stride].name for stride in strides if last[stride].channels_last}
    names = [feature.name for feature in maps if feature.stride <= strides[-1]]
    stages = [[feature.name for feature in maps if feature.stride == stride] for stride in (2, *STRIDES)]
    return Body(Chain(model, names, outputs, channels_last), stages, [last[stride].channels for stride in strides])


class _Map(NamedTuple):
    """What a child makes of an image: its own name, and the kind of the map."""

    name: str
    stride: int
    channels: int
    channels_last: bool


def _maps(model: nn.Module) -> list[_Map]:
    """Those of the children, one after the other, up to the first that makes no map of its input."""
    x, found = torch.zeros(1, 3, _SIDE, 3 * _SIDE // 2), []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for name, child in _children(model):
            try:
                x = child(x)
            except (RuntimeError, TypeError, ValueError, AssertionError):  # it takes something else than a map
                break
            first, height, width = x.shape[1:] if isinstance(x, Tensor) and x.ndim == 4 else (1, 1, 1)
            last = _is_wide(first, height) and not _is_wide(height, width)
            if not (last or _is_wide(height, width)):
                break
            stride = 2 ** round(math.log2(_SIDE / (first if last else height)))
            found.append(_Map(name, stride, width if last else first, last))
    model.train(was_training)
    return found


def _is_wide(height: int, width: int) -> bool:
    """Whether a map has the shape of the image, 1.5 times as wide as high, up to what convolutions leave out."""
    return height > 1 and 1.3 * height < width < 1.8 * height


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if name in _CONTAINERS:
            yield from ((f"{name}.{inner}", module) for inner, module in child.named_children())
        else:
            yield name, child


def timm_body(name: str, strides: tuple[int, ...]) -> tuple[Body, list[int]]:
    """The body of a model of timm, by its `features_only`, and the positions of the maps in what it returns.

    Raises:
        UserError: timm is not installed, unknown name, or it has no map of each of the strides.
    """
    try:
        import timm
    except ImportError:
        raise UserError(f"MODEL.BACKBONE.NAME timm/{name}: timm is not installed; pip install timm") from None
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.0)[0]
        raise UserError(f"MODEL.BACKBONE.NAME timm/{name}: unknown to timm; the nearest name is {nearest}")
    body: Any
    try:  # with the names of the weights of the classifier, where the model can
        body = timm.create_model(name, features_only=True, feature_cls="getter")
    except (RuntimeError, AttributeError, AssertionError, TypeError, ValueError):
        body = timm.create_model(name, features_only=True)
    found = dict(zip(body.feature_info.reduction(), itertools.count()))  # the last one of each
    _check_strides(f"timm/{name}", strides, list(found))
    positions = [found[stride] for stride in strides]
    channels = body.feature_info.channels()
    return Body(body, [], [channels[position] for position in positions]), positions


def _check_strides(name: str, strides: tuple[int, ...], found: list[int]) -> None:
    if missing := [stride for stride in strides if stride not in found]:
        raise UserError(
            f"MODEL.BACKBONE.NAME {name}: a pyramid takes maps of strides {list(strides)}, it has none of {missing}; "
            "choose another backbone"
        )
