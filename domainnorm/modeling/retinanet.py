"""RetinaNet whose head normalizes pyramid levels as domains."""

import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection import retinanet
from torchvision.models.detection._utils import encode_boxes
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import generalized_box_iou_loss
from torchvision.ops.misc import Conv2dNormActivation

from ..distributed import all_reduce_sum, world_size
from ..layers import DomainBatchNorm, get_norm, normalize_layers
from ..ops.moments import wide
from ..surgery.domains import use_domains_of
from .channels_last import ChannelsLast, Transform
from .detections import Detections
from .focal_loss import focal_loss
from .predictors import ClassRows, Predictors


class RetinaNetHead(retinanet.RetinaNetHead):
    """Two towers of convolutions shared by all pyramid levels; list of features in, predictions out.

    The norm of each tower layer is one layer for all levels, which are its domains: by the three choices of
    `DomainBatchNorm`, every row of Table 5 of *Rethinking "Batch"*. The towers run in step, so that a synchronized
    norm costs one collective per depth and direction for both towers and all levels (App. A.6).

    State-dict keys are torchvision's: the heads of its RetinaNet checkpoints load, `norm=""` (v1) or `norm="GN"` (v2).

    Args:
        in_channels: of every level.
        num_anchors: per location.
        num_classes: without background; labels are 0 to `num_classes - 1`.
        num_levels: of the pyramid.
        num_convs: in each tower.
        norm: as `get_norm`, with its `norm_options`.
        norm_domains: what a domain of the norm is: a `"level"` of the pyramid; one of `num_datasets` data sets
            (`"dataset"`), which `dn.use_domain` says; or a `"level_and_dataset"`, the levels of each data set one after
            the other.
        sgd_statistics, population_statistics, affine: of `DomainBatchNorm`, where `norm` is one.
        prior_prob: of foreground, at the first step.
        focal_alpha, focal_gamma: of the focal loss.
        box_loss: `"smooth_l1"` with `smooth_l1_beta`, or `"giou"`.
    """

    def __init__(
        self,
        in_channels: int,
        num_anchors: int,
        num_classes: int,
        *,
        num_levels: int = 5,
        num_convs: int = 4,
        norm: str = "",
        norm_options: Mapping[str, Any] | None = None,
        norm_domains: str = "level",
        num_datasets: int = 1,
        sgd_statistics: str = "per_domain",
        population_statistics: str = "per_domain",
        affine: str | None = "shared",
        prior_prob: float = 0.01,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        box_loss: str = "smooth_l1",
        smooth_l1_beta: float = 0.1,
    ) -> None:
        super().__init__(in_channels, num_anchors, num_classes)
        self.norm_domains = norm_domains
        self.num_levels = num_levels
        sets = 1 if norm_domains == "level" else num_datasets
        norm_layer = None
        if norm:
            norm_layer = partial(
                get_norm,
                norm,
                **(norm_options or {}),
                num_domains=sets if norm_domains == "dataset" else num_levels * sets,
                sgd_statistics=sgd_statistics,
                population_statistics=population_statistics,
                affine=affine,
            )
        for head in (self.classification_head, self.regression_head):
            head.conv = nn.Sequential(
                *(Conv2dNormActivation(in_channels, in_channels, norm_layer=norm_layer) for _ in range(num_convs))
            )
            for layer in head.conv.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, std=0.01)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
        nn.init.constant_(self.classification_head.cls_logits.bias, -math.log((1 - prior_prob) / prior_prob))
        for layer in self.modules():
            if isinstance(layer, DomainBatchNorm) and norm_domains != "dataset":
                layer.domains_per_name = num_levels
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.box_loss = box_loss
        self.smooth_l1_beta = smooth_l1_beta

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        """`cls_logits` `(N, anchors, classes)` and `bbox_regression` `(N, anchors, 4)`, anchors of all levels.

        In inference under minibatch statistics each image is its own normalization batch.
        """
        if not self.training and self._uses_minibatch() and features[0].shape[0] > 1:
            images = [self([f[i : i + 1] for f in features]) for i in range(features[0].shape[0])]
            return {key: torch.cat([image[key] for image in images]) for key in images[0]}
        cls, box = self.classification_head, self.regression_head
        towers = [features, features]
        for blocks in zip(cls.conv, box.conv, strict=True):
            towers = self._blocks_in_step(blocks, towers)
        return {
            "cls_logits": _flatten([cls.cls_logits(x) for x in towers[0]], cls.num_classes),
            "bbox_regression": _flatten([box.bbox_reg(x) for x in towers[1]], 4),
        }

    def _blocks_in_step(self, blocks: tuple[nn.Sequential, ...], inputs: list[list[Tensor]]) -> list[list[Tensor]]:
        """One block (convolution, norm, activation) of each tower, applied to the levels of each."""
        for layers in zip(*blocks, strict=True):
            if isinstance(layers[0], DomainBatchNorm):
                domains = self._domains(layers[0], len(inputs[0]))
                if layers[0].sync_group is not None:  # one collective; forward hooks of the layers are not called
                    inputs = normalize_layers(layers, inputs, domains)
                else:
                    inputs = [layer(levels, domains) for layer, levels in zip(layers, inputs, strict=True)]
            else:
                inputs = [[layer(x) for x in levels] for layer, levels in zip(layers, inputs, strict=True)]
        return inputs

    def _domains(self, layer: DomainBatchNorm, num_levels: int) -> list[Any] | None:
        """The domains of each level's samples, where they are not just the levels."""
        if self.norm_domains == "dataset":
            return [layer.domain_in_use() if layer.num_domains > 1 else 0] * num_levels
        if layer.num_domains == self.num_levels:
            return None
        return [layer.domain_in_use() * self.num_levels + level for level in range(num_levels)]

    def _uses_minibatch(self) -> bool:
        return any(m.uses_minibatch for m in self.modules() if isinstance(m, DomainBatchNorm))

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Focal loss and box loss, both divided by the number of foreground anchors of the whole batch.

        The batch is the total batch, over all ranks (one collective of one number), and a plain sum, not a running
        average: W processes then take the same step as one, an image weighs by its objects and not by the rank
        it landed on, and there is no state to initialize, save and keep equal on all ranks.
        """
        matched = torch.stack(matched_idxs)  # (N, A): box of its image, or below zero
        foreground = matched >= 0
        # DDP averages gradients over ranks: each divides by its share of the sum.
        count = all_reduce_sum(foreground.sum()).clamp(min=1) / world_size()
        decided = (matched != self.classification_head.BETWEEN_THRESHOLDS).flatten()
        foreground = foreground.flatten()

        at = torch.cat(anchors)
        # All anchors keep their places, also those without a box: to know how many have one, a GPU would have to wait.
        # Boxes of all images in one list, and one more that nobody has: an image's begin where those before it end.
        begins = itertools.accumulate((len(t["boxes"]) for t in targets), initial=0)
        which = torch.cat([m.clamp(min=0) + begin for m, begin in zip(matched_idxs, begins, strict=False)])
        boxes = torch.cat([*(t["boxes"] for t in targets), at.new_zeros(1, 4)])[which]
        labels = torch.cat([*(t["labels"] for t in targets), which.new_zeros(1)])[which]

        logits = head_outputs["cls_logits"].flatten(0, 1)
        loss_cls = focal_loss(logits, decided, foreground, labels, self.focal_alpha, self.focal_gamma)
        regression = head_outputs["bbox_regression"].flatten(0, 1)
        loss_box = self._box_loss(regression, at, boxes, foreground)
        return {"loss_cls": loss_cls / count, "loss_box_reg": loss_box / count}

    def _box_loss(self, regression: Tensor, anchors: Tensor, boxes: Tensor, foreground: Tensor) -> Tensor:
        coder = self.regression_head.box_coder
        if self.box_loss == "giou":  # torchvision's function makes a GPU wait in any case
            regression, anchors, boxes = regression[foreground], anchors[foreground], boxes[foreground]
            return generalized_box_iou_loss(coder.decode_single(regression, anchors), boxes, reduction="sum")
        # as coder.encode_single, for whose weights a GPU would wait
        weights = torch.stack([anchors.new_full((), weight) for weight in coder.weights])
        target = encode_boxes(boxes, anchors, weights)
        regression, target = (v.where(foreground[:, None], 0) for v in (regression, target))
        return F.smooth_l1_loss(regression, target, beta=self.smooth_l1_beta, reduction="sum")


class RetinaNet(TorchvisionRetinaNet, ChannelsLast):
    """torchvision's RetinaNet, in which a prediction depends on its own image only.

    In training, images come in the size they are trained at; in inference they are resized here, and boxes are in
    the pixels of the image given.
    """

    transform: Transform
    optional: tuple[str, ...] = ()  # modules that weights to begin with may lack, or have beside others

    def __init__(self, backbone: nn.Module, num_classes: int, **options: Any) -> None:
        super().__init__(backbone, num_classes, **options)
        made = self.transform
        self.transform = Transform(made.min_size, made.max_size, made.image_mean, made.image_std, _skip_resize=True)

    def predictors(self) -> Predictors:
        """The layers that have rows for each class."""
        return {"head.classification_head.cls_logits": ClassRows(repeats=self.head.classification_head.num_anchors)}

    def for_export(self) -> "DenseRetinaNet":
        """What an exported program computes."""
        return DenseRetinaNet(self)

    def for_boxes(self) -> Detections:
        """What an exported program computes up to the final boxes."""
        return Detections(self)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Images `(3, H, W)` in [0, 1], targets with `boxes` (xyxy) and `labels` (from 0) -> losses or detections.

        Where data sets are the domains of norms, targets have `domain`; in inference `dn.use_domain` says it.
        """
        self.arrange_weights()
        if self.training:
            use_domains_of(self, targets)
            return super().forward(images, targets)
        # One at a time: neither minibatch statistics nor the padding to a common size may see another image.
        return [super(RetinaNet, self).forward([image])[0] for image in images]


class DenseRetinaNet(nn.Module):
    """What a RetinaNet computes before boxes are decoded and chosen by NMS.

    Attributes:
        stride: of the levels that come from the backbone: sides of images are multiples of it.
        min_side: of images: torch.export makes a constant of a side of 1, as the last level has below (160: P7).
    """

    stride = 32

    def __init__(self, model: RetinaNet) -> None:
        super().__init__()
        self.model = model
        self.min_side = max(4 << model.head.num_levels, 32) + 32

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images `(N, 3, H, W)` in [0, 1] -> `cls_logits` `(N, A, classes)`, `bbox_regression` `(N, A, 4)` and the
        `anchors` `(A, 4)` that it is relative to, in pixels."""
        images = self.model.transform.normalize(images)
        features = list(self.model.backbone(images).values())
        listed = ImageList(images, [(images.shape[2], images.shape[3])])
        return self.model.head(features) | {"anchors": self.model.anchor_generator(listed, features)[0]}


def _flatten(levels: list[Tensor], columns: int) -> Tensor:
    """Maps `(N, A · columns, H, W)` of all levels -> `(N, ΣHWA, columns)`, in float32 or better."""
    # Not flatten(), whose sizes an export to ONNX takes for constants.
    rows = [x.unflatten(1, (-1, columns)).permute(0, 3, 4, 1, 2).reshape(x.shape[0], -1, columns) for x in levels]
    return wide(torch.cat(rows, dim=1))
