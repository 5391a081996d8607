"""Classifiers whose backbones have a chosen norm."""

import difflib
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from ..data import num_classes
from ..errors import UserError
from ..layers import DomainBatchNorm
from ..ops.moments import wide
from ..statistics.preserve import preserve_state
from ..surgery.domains import use_domains_of
from .cifar_resnet import CifarResNet
from .initialize import Loading, load_pretrained
from .norm import norm_options, with_norm
from .predictors import ClassRows, Predictors
from .pretrained import Weights
from .wide_resnet import SimpleNet, WideResNet


class Classifier(nn.Module):
    """An image classifier.

    Args:
        body: images `(N, 3, H, W)` -> logits `(N, classes)`; what a detector's backbone can be initialized with.
        image_mean, image_std: of RGB in [0, 1].
        label_smoothing: the share of a target that all classes have equally.

    Attributes:
        loaded: what of the weights to begin with was loaded, and what was not; "": nothing.
        minibatch_size: how many images, one after the other, are normalized together in inference under minibatch
            statistics. 1: a prediction depends on its own image only, as under population statistics.
    """

    def __init__(
        self, body: nn.Module, image_mean: list[float], image_std: list[float], label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.body = body
        self.loaded = ""
        self.minibatch_size = 1
        for name, value in (("image_mean", image_mean), ("image_std", image_std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    image_mean: Tensor
    image_std: Tensor

    def predictors(self) -> Predictors:
        """The layers that have rows for each class."""
        return {f"body.{_last_layer(self.body)}": ClassRows()}

    def forward(self, images: list[Tensor] | Tensor, targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Images `(3, H, W)` of one size, in [0, 1], and targets with `labels` `()` -> losses, in eval logits.

        Where data sets are the domains of norms, targets have `domain`; in inference `dn.use_domain` says it.
        """
        images = images if isinstance(images, Tensor) else torch.stack(images)
        x = (images - self.image_mean) / self.image_std
        if self.training:
            if targets is None:
                raise ValueError("a classifier in training mode takes targets, got none: call eval() for predictions")
            use_domains_of(self, targets)
            labels = torch.stack([target["labels"] for target in targets])
            loss = F.cross_entropy(wide(self.body(x)), labels, label_smoothing=self.label_smoothing)
            return {"loss_cls": loss}
        if any(m.uses_minibatch for m in self.body.modules() if isinstance(m, DomainBatchNorm)):
            return torch.cat([self.body(part) for part in x.split(self.minibatch_size)])
        return self.body(x)


def build_classifier(cfg: CfgNode, weights: Weights, loading: Loading) -> Classifier:
    """The classifier of `cfg`, with `weights`.

    They are a checkpoint of such a classifier, or those of the torchvision or timm model itself, which are loaded
    before its norms are exchanged.

    Raises:
        UserError: unknown backbone, weights that do not fit, a frozen norm without weights.
    """
    name, norm = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.NORM
    if norm == "FrozenBN" and not weights.source:
        raise UserError(
            "MODEL.BACKBONE.NORM 'FrozenBN' contradicts MODEL.WEIGHTS '': random statistics would be frozen; choose "
            "another norm, such as BN, or name weights"
        )
    body = _body(name, num_classes(cfg), cfg.INPUT.CROP_SIZE)
    loaded, whole = "", any("body." in key for key in weights.state_dict)
    if weights.source and not whole:
        loaded = load_pretrained(body, {_last_layer(body): ClassRows()}, weights, loading)
    body = with_norm(body, norm, norm_options(cfg, norm) if norm else {}, name)
    mean, std = list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
    model = Classifier(body, mean, std, cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING)
    if whole:
        loaded = load_pretrained(model, model.predictors(), weights, loading)
    model.loaded = loaded
    _try_image(cfg, model)
    return model


@torch.no_grad()
def _try_image(cfg: CfgNode, model: Classifier) -> None:
    """UserError now, and not in the first step, if the body does not take images of this size."""
    side = cfg.INPUT.CROP_SIZE
    try:
        with preserve_state(model):
            use_domains_of(model, [{"domain": torch.tensor(0)}])
            model.eval()([torch.zeros(3, side, side)])
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} with NORM {cfg.MODEL.BACKBONE.NORM!r} does not take images "
            f"of INPUT.CROP_SIZE {side}: {' '.join(str(error).split())}"
        ) from error


def _body(name: str, classes: int, side: int) -> nn.Module:
    family, _, rest = name.partition("/")
    if family == "timm" and rest:
        try:
            import timm
        except ImportError:
            raise UserError(f"MODEL.BACKBONE.NAME {name}: timm is not installed; pip install timm") from None
        if not timm.is_model(rest):
            raise UserError(f"MODEL.BACKBONE.NAME {name}: unknown to timm; {_nearest(rest, timm.list_models())}")
        return timm.create_model(rest, num_classes=classes)
    if name.startswith("cifar_resnet") and (depth := name.removeprefix("cifar_resnet")).isdecimal():
        try:
            return CifarResNet(int(depth), classes)
        except ValueError as error:
            raise UserError(f"MODEL.BACKBONE.NAME {name}: {error}") from error
    if name.startswith("cifar_wide_resnet"):
        depth, _, width = name.removeprefix("cifar_wide_resnet").partition("_")
        if not (depth.isdecimal() and width.isdecimal()):
            raise UserError(f"MODEL.BACKBONE.NAME {name}: expected cifar_wide_resnetDEPTH_WIDTH, such as 28_10")
        try:
            return WideResNet(int(depth), int(width), classes)
        except ValueError as error:
            raise UserError(f"MODEL.BACKBONE.NAME {name}: {error}") from error
    if name.startswith("simplenet"):
        widths = name.split("_")[1:]
        if not all(width.isdecimal() and int(width) for width in widths):
            raise UserError(f"MODEL.BACKBONE.NAME {name}: expected widths of linear layers, such as simplenet_512_300")
        return SimpleNet(side * side, list(map(int, widths)), classes)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        names = [*known, "cifar_resnet18", "cifar_resnet20", "cifar_wide_resnet28_10", "simplenet_512_300"]
        raise UserError(
            f"MODEL.BACKBONE.NAME {name}: a classifier takes a name of torchvision.models, cifar_resnet18, "
            "cifar_resnet20 (any 6n + 2), cifar_wide_resnet28_10, simplenet_512_300, or timm/NAME; "
            f"{_nearest(name, names)}"
        )
    # without the heads that only training has
    plain = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **plain)


def _nearest(name: str, names: list[str]) -> str:
    return f"the nearest name is {difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]}"


def _last_layer(body: nn.Module) -> str:
    """The name of the layer that computes the logits."""
    return [name for name, module in body.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
