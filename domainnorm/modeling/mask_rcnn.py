"""Faster and Mask R-CNN whose heads normalize a chosen batch of RoIs."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import generalized_rcnn, roi_heads, rpn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import maskrcnn_inference, project_masks_on_boxes

from ..distributed import all_reduce_sum, world_size
from ..distributed.roi_shuffle import RoIShuffle
from ..layers import DomainBatchNorm, get_norm
from ..ops.moments import wide
from ..surgery.domains import use_domains_of
from .channels_last import ChannelsLast
from .detections import Detections
from .predictors import ClassRows, Predictors

SMOOTH_L1_BETA = 1 / 9  # torchvision's


class RPNHead(rpn.RPNHead):
    """torchvision's, whose outputs are float32 or better: there is no NMS of half precision."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps `(N, C, H, W)` of all levels -> objectness `(N, A, H, W)` and deltas `(N, 4A, H, W)` of each."""
        objectness, deltas = super().forward(x)
        return [wide(v) for v in objectness], [wide(v) for v in deltas]


class RegionProposalNetwork(rpn.RegionProposalNetwork):
    """torchvision's RPN; its losses are sums over the sampled anchors, divided by the most that may be sampled.

    So, as in detectron2, every image weighs the same on however many ranks, and an image without a sample costs 0.

    Args:
        smooth_l1_beta: where the loss of boxes turns linear, in units of the box code; 0: it is L1.
        args, options: of torchvision's.
    """

    def __init__(self, *args: Any, smooth_l1_beta: float = SMOOTH_L1_BETA, **options: Any) -> None:
        super().__init__(*args, **options)
        self.smooth_l1_beta = smooth_l1_beta

    def compute_loss(
        self, objectness: Tensor, deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits `(ΣA, 1)`, deltas `(ΣA, 4)`, and of each image labels `(A,)`, targets `(A, 4)` -> two losses."""
        positive, negative = (torch.cat(sampled) > 0 for sampled in self.fg_bg_sampler(labels))
        logits = wide(objectness).flatten()
        # All anchors keep their places: to know how many were sampled, a GPU would have to wait.
        losses = F.binary_cross_entropy_with_logits(logits, torch.cat(labels).to(logits), reduction="none")
        loss_objectness = losses.where(positive | negative, 0).sum()
        loss_box = _smooth_l1(deltas, torch.cat(regression_targets), positive, self.smooth_l1_beta)
        max_sampled = self.fg_bg_sampler.batch_size_per_image * len(labels)
        return loss_objectness / max_sampled, loss_box / max_sampled


class RoIHeads(roi_heads.RoIHeads):
    """torchvision's box and mask branch, over RoIs that may be shuffled over the ranks.

    Losses are sums over RoIs, divided by the RoIs of the total batch, over all ranks (one collective of two numbers):
    a RoI weighs the same on whatever rank it is, and a rank without any, or without a positive one, has losses of 0
    and gradients for every parameter.

    State-dict keys are torchvision's and, if shuffled, `box_shuffle.step` and `mask_shuffle.step`; weights of a
    shuffled model load into one that is not, and the other way round.

    Args:
        shuffle_seed: of the permutations, equal on all ranks; None: RoIs stay on their rank.
        smooth_l1_beta: where the loss of boxes turns linear, in units of the box code; 0: it is L1.
        options: of torchvision's RoIHeads.
    """

    def __init__(
        self, *, shuffle_seed: int | None = None, smooth_l1_beta: float = SMOOTH_L1_BETA, **options: Any
    ) -> None:
        super().__init__(**options)
        self.smooth_l1_beta = smooth_l1_beta
        self.box_shuffle = self.mask_shuffle = None
        if shuffle_seed is not None:
            # groups of samples must not be of neighbours
            mixed = any(isinstance(m, DomainBatchNorm) and m.sample_groups is not None for m in self.modules())
            self.box_shuffle = RoIShuffle(self.box_branch, shuffle_seed, in_order=mixed)
            if self.has_mask():
                self.mask_shuffle = RoIShuffle(self.mask_branch, shuffle_seed, in_order=mixed)

    def box_branch(self, x: Tensor) -> Tensor:
        """Features `(R, C, H, W)` -> class logits and box deltas in one tensor, `(R, K + 4K)`, background included."""
        return torch.cat(self.box_predictor(self.box_head(x)), dim=1)

    def mask_branch(self, x: Tensor) -> Tensor:
        """Features `(R, C, H, W)` -> mask logits `(R, K, 2H, 2W)`, background included."""
        return self.mask_predictor(self.mask_head(x))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *others: Any) -> None:
        for name in ("box_shuffle", "mask_shuffle"):
            shuffle, key = getattr(self, name), f"{prefix}{name}.step"
            if shuffle is None:
                state_dict.pop(key, None)
            else:
                state_dict.setdefault(key, shuffle.step)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """In training `([], losses)`, in inference `(detections, {})`; labels are from 1, 0 is background."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detections(features, proposals, image_shapes), {}

    def _losses(self, features: Any, proposals: list[Tensor], image_shapes: Any, targets: Any) -> dict[str, Tensor]:
        proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        all_labels = torch.cat(labels)
        foreground = all_labels > 0
        # DDP averages gradients over ranks: each divides by its share of the sums.
        counts = all_reduce_sum(torch.stack([torch.ones_like(all_labels).sum(), foreground.sum()]))

        logits, regression = self._box_predictions(features, proposals, image_shapes)
        num_rois, num_foreground = counts.clamp(min=1).to(logits.dtype) / world_size()
        regression = regression[torch.arange(len(regression), device=regression.device), all_labels]
        losses = {
            "loss_cls": F.cross_entropy(logits, all_labels, reduction="sum") / num_rois,
            "loss_box_reg": _smooth_l1(regression, torch.cat(deltas), foreground, self.smooth_l1_beta) / num_rois,
        }
        if self.has_mask():
            proposals, matched, labels = _positive(labels, proposals, matched, labels)
            logits = self._mask_logits(features, proposals, image_shapes)
            logits = logits[torch.arange(len(logits), device=logits.device), torch.cat(labels)]
            goals = [
                project_masks_on_boxes(target["masks"], boxes, match, logits.shape[-1])
                for target, boxes, match in zip(targets, proposals, matched, strict=True)
            ]
            loss = F.binary_cross_entropy_with_logits(logits, torch.cat(goals).to(logits), reduction="sum")
            losses["loss_mask"] = loss / (num_foreground * logits.shape[1:].numel())
        return losses

    def _detections(self, features: Any, proposals: list[Tensor], image_shapes: Any) -> list[dict[str, Tensor]]:
        logits, regression = self._box_predictions(features, proposals, image_shapes)
        boxes, scores, labels = self.postprocess_detections(logits, regression.flatten(1), proposals, image_shapes)
        found = {"boxes": boxes, "scores": scores, "labels": labels}
        if self.has_mask():
            found["masks"] = maskrcnn_inference(self._mask_logits(features, boxes, image_shapes), labels)
        return [dict(zip(found, of_image, strict=True)) for of_image in zip(*found.values(), strict=True)]

    def _box_predictions(self, features: Any, boxes: list[Tensor], image_shapes: Any) -> tuple[Tensor, Tensor]:
        """Class logits `(R, K)` and box deltas `(R, K, 4)` of all images' boxes."""
        x = self.box_roi_pool(features, boxes, image_shapes)
        _repeat_domains(self.box_head, boxes)
        predictions = wide((self.box_shuffle or self.box_branch)(x))
        classes = predictions.shape[1] // 5
        return predictions[:, :classes], predictions[:, classes:].unflatten(1, (classes, 4))

    def _mask_logits(self, features: Any, boxes: list[Tensor], image_shapes: Any) -> Tensor:
        """`(R, K, M, M)` of all images' boxes."""
        x = self.mask_roi_pool(features, boxes, image_shapes)
        _repeat_domains(self.mask_head, boxes)
        return wide((self.mask_shuffle or self.mask_branch)(x))


class GeneralizedRCNN(generalized_rcnn.GeneralizedRCNN, ChannelsLast):
    """torchvision's Faster or Mask R-CNN, in which a prediction depends on its own image only.

    In training, images come in the size they are trained at; in inference they are resized here, and boxes and masks
    are in the pixels of the image given. Under minibatch statistics the RoIs of an image are one normalization batch.
    """

    not_exportable = (
        "a GeneralizedRCNN cannot be exported: its heads run on RoIs whose number differs from image to image; "
        "export a RetinaNet or a classifier, or its final boxes to ONNX (boxes=True, --boxes)"
    )

    optional = ("roi_heads.mask_head", "roi_heads.mask_predictor")  # what weights to begin with may lack, or have

    def for_boxes(self) -> Detections:
        """What an exported program computes up to the final boxes and masks."""
        return Detections(self)

    def predictors(self) -> Predictors:
        """The layers that have rows for each class."""
        rows = {"box_predictor.cls_score": ClassRows(background=1), "box_predictor.bbox_pred": ClassRows(1, 1, 4)}
        if self.roi_heads.has_mask():
            rows["mask_predictor.mask_fcn_logits"] = ClassRows(background=1)
        return {f"roi_heads.{layer}": of_classes for layer, of_classes in rows.items()}

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Images `(3, H, W)` in [0, 1] and targets -> losses in training, in inference a list of detections.

        Targets have `boxes` (xyxy), `labels` (from 0) and, for masks, `masks` `(n, H, W)`; detections also `scores`,
        and their masks are probabilities `(n, 1, H, W)`. Where data sets are the domains of norms, targets have
        `domain`; in inference `dn.use_domain` says it.
        """
        self.arrange_weights()
        if self.training:
            use_domains_of(self, targets)
            # torchvision counts background as class 0
            return super().forward(
                images, targets and [target | {"labels": target["labels"] + 1} for target in targets]
            )
        # One at a time: neither minibatch statistics nor the padding to a common size may see another image.
        found = [super(GeneralizedRCNN, self).forward([image])[0] for image in images]
        return [detections | {"labels": detections["labels"] - 1} for detections in found]


def _repeat_domains(head: nn.Module, boxes: list[Tensor]) -> None:
    """Where each image has a domain, it becomes that of its RoIs."""
    for layer in head.modules():
        if isinstance(layer, DomainBatchNorm) and isinstance(layer.current_domain, Tensor):
            counts = torch.tensor([len(of_image) for of_image in boxes], device=layer.current_domain.device)
            layer.current_domain = layer.current_domain.repeat_interleave(counts)


def box_head(
    in_channels: int,
    resolution: int,
    *,
    num_conv: int,
    conv_dim: int,
    num_fc: int,
    fc_dim: int,
    norm: str,
    **options: Any,
) -> nn.Module:
    """Features `(R, in_channels, resolution, resolution)` -> `(R, fc_dim)`; `options` are the norm's.

    Two linear layers without convolutions are torchvision's `TwoMLPHead` and have its state-dict keys.
    """
    if num_conv == 0 and num_fc == 2:
        return TwoMLPHead(in_channels * resolution**2, fc_dim)
    shape = (in_channels, resolution, resolution)
    return FastRCNNConvFCHead(shape, [conv_dim] * num_conv, [fc_dim] * num_fc, norm_layer=_norm_layer(norm, options))


def mask_head(in_channels: int, *, num_conv: int, conv_dim: int, norm: str, **options: Any) -> nn.Module:
    """Features `(R, in_channels, H, W)` -> `(R, conv_dim, H, W)`; `options` are the norm's."""
    return MaskRCNNHeads(in_channels, [conv_dim] * num_conv, dilation=1, norm_layer=_norm_layer(norm, options))


def _norm_layer(norm: str, options: Mapping[str, Any]) -> Callable[[int], nn.Module | None] | None:
    return partial(get_norm, norm, **options) if norm else None


def _positive(labels: list[Tensor], *values: list[Tensor]) -> list[list[Tensor]]:
    """The positive RoIs of each image, of each of `values`; a GPU is waited for, to know how many there are."""
    foreground = [of_image.nonzero()[:, 0] for of_image in labels]
    return [[v[index] for v, index in zip(of_images, foreground, strict=True)] for of_images in values]


def _smooth_l1(deltas: Tensor, goals: Tensor, chosen: Tensor, beta: float) -> Tensor:
    """The sum over the rows that are `chosen`, a boolean `(R,)`; the others keep their places and count as 0."""
    deltas, goals = (v.where(chosen[:, None], 0) for v in (wide(deltas), goals.to(wide(deltas))))
    return F.smooth_l1_loss(deltas, goals, beta=beta, reduction="sum")
