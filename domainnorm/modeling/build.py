"""A config -> a model."""

import logging
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from ..data import domain_names, num_classes
from ..data.classes import known_classes, with_classes
from ..distributed import get_device, rank
from ..errors import UserError
from ..layers import BatchGroupNorm
from ..surgery.domains import name_domains
from .anchors import AnchorGenerator, ExactAnchorGenerator
from .backbone import build_backbone
from .channels_last import Transform
from .classifier import build_classifier
from .description import describe_model
from .initialize import Loading, initialize_detector
from .mask_rcnn import GeneralizedRCNN, RegionProposalNetwork, RoIHeads, RPNHead, box_head, mask_head
from .norm import fix_weights, own_options, roi_norm_options
from .pretrained import read_weights
from .retinanet import RetinaNet, RetinaNetHead
from .roi_align import RoIAlign

logger = logging.getLogger(__name__)


def build_model(cfg: CfgNode, *, trained: bool = False) -> nn.Module:
    """Build the detector or classifier of `cfg`, on this rank's device, with the weights of `MODEL.WEIGHTS`.

    In training, `model(images, targets)` returns a dict of losses; in inference, `model(images)` returns a list of
    detections or, for a classifier, logits. Images are `(3, H, W)`, RGB in [0, 1]. See `RetinaNet`, `GeneralizedRCNN`
    and `Classifier`.

    The classes are those of `MODEL.CLASS_NAMES`, otherwise of the training sets, otherwise of the weights: the config
    saved by a run, or any other with its weights, needs no data set. If the weights have the same classes in another
    order, they are reordered. If they have another number of classes, whether from this library or torchvision, with or
    without a mask branch, they are loaded as far as they fit, including the rows of classes with the same name; the log
    says what is newly initialized.

    Args:
        cfg: from `load_config`.
        trained: whether the weights must be those of the whole model, for predictions, and not only its initial
            weights.

    Returns:
        The model. Its attribute `description` describes it in plain values: `class_names`, `num_classes`, `domains`,
        image sizes, `pixel_mean`, `pixel_std`, `versions`. Its attribute `loaded` says which weights were loaded.

    Raises:
        UserError: the weights do not fit, or the number of classes is neither given nor known from a data set.

    Example::

        >>> cfg = dn.load_config("quickstart.yaml", ["MODEL.RETINANET.NUM_CLASSES", 3])
        >>> detections = dn.build_model(cfg).eval()([torch.rand(3, 64, 64)])
        >>> sorted(detections[0])
        ['boxes', 'labels', 'scores']
    """
    weights = read_weights(cfg.MODEL.WEIGHTS)
    cfg = with_classes(cfg, known_classes(cfg) or weights.class_names)
    loading = Loading(cfg.MODEL.CLASS_NAMES, trained=trained, strict=cfg.MODEL.WEIGHTS_STRICT)
    model: Any
    if cfg.MODEL.META_ARCHITECTURE == "Classifier":
        model = _name_domains(cfg, build_classifier(cfg, weights, loading))
    else:
        model = _build_retinanet(cfg) if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else _build_rcnn(cfg)
        _check_pieces(model)
        _name_domains(cfg, model)
        model.loaded = initialize_detector(model, weights, loading) if weights.source else ""
    if model.loaded and rank() == 0:
        logger.log(logging.WARNING if ";" in model.loaded else logging.INFO, "%s", model.loaded)
    model.description = describe_model(cfg)
    return fix_weights(cfg, model).to(get_device(cfg.MODEL.DEVICE))


def _name_domains(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Where data sets are the domains of norms, they have their names."""
    return name_domains(model, domain_names(cfg)) if cfg.MODEL.NORM_DOMAINS else model


def _check_pieces(model: nn.Module) -> None:
    """UserError if a norm whose features have many sizes splits them in space."""
    for name, layer in model.named_modules():
        splits = isinstance(layer, BatchGroupNorm) and layer.num_features % layer.num_groups
        if splits and not name.startswith("roi_heads."):  # RoIs have one size
            raise UserError(
                f"MODEL.NORM.BGN.NUM_GROUPS {layer.num_groups} splits the {layer.num_features} channels of {name} in "
                f"space, and a detector's features have many sizes: use a divisor of {layer.num_features}, or set "
                "MODEL.NORM.BGN.SPLIT_SPACE False"
            )


def _build_retinanet(cfg: CfgNode) -> RetinaNet:
    options = cfg.MODEL.RETINANET
    anchors = _anchors(cfg, octave_scales=3)
    backbone = build_backbone(cfg)
    classes = num_classes(cfg)
    head = RetinaNetHead(
        backbone.out_channels,
        anchors.num_anchors_per_location()[0],
        classes,
        num_levels=cfg.MODEL.FPN.NUM_LEVELS,
        num_convs=options.NUM_CONVS,
        norm=options.NORM,
        norm_options=own_options(cfg, options.NORM),
        norm_domains=options.NORM_DOMAINS,
        num_datasets=max(len(domain_names(cfg)), 1),
        sgd_statistics=options.SGD_STATISTICS,
        population_statistics=options.POPULATION_STATISTICS,
        affine=options.AFFINE or None,
        prior_prob=options.PRIOR_PROB,
        focal_alpha=options.FOCAL_LOSS_ALPHA,
        focal_gamma=options.FOCAL_LOSS_GAMMA,
        box_loss=options.BBOX_REG_LOSS_TYPE,
        smooth_l1_beta=options.SMOOTH_L1_LOSS_BETA,
    )
    return RetinaNet(
        backbone,
        classes,
        min_size=cfg.INPUT.MIN_SIZE_TEST,
        max_size=cfg.INPUT.MAX_SIZE_TEST,
        image_mean=list(cfg.MODEL.PIXEL_MEAN),
        image_std=list(cfg.MODEL.PIXEL_STD),
        anchor_generator=anchors,
        head=head,
        score_thresh=options.SCORE_THRESH_TEST,
        nms_thresh=options.NMS_THRESH_TEST,
        detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        bg_iou_thresh=options.IOU_THRESHOLDS[0],
        fg_iou_thresh=options.IOU_THRESHOLDS[1],
        topk_candidates=options.TOPK_CANDIDATES_TEST,
    )


def _build_rcnn(cfg: CfgNode) -> GeneralizedRCNN:
    backbone = build_backbone(cfg)
    channels, classes = backbone.out_channels, num_classes(cfg) + 1  # 0 is background

    options = cfg.MODEL.RPN
    anchors = _anchors(cfg, octave_scales=1)
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=options.NUM_CONV),
        fg_iou_thresh=options.IOU_THRESHOLDS[1],
        bg_iou_thresh=options.IOU_THRESHOLDS[0],
        batch_size_per_image=options.BATCH_SIZE_PER_IMAGE,
        positive_fraction=options.POSITIVE_FRACTION,
        pre_nms_top_n={"training": options.PRE_NMS_TOPK_TRAIN, "testing": options.PRE_NMS_TOPK_TEST},
        post_nms_top_n={"training": options.POST_NMS_TOPK_TRAIN, "testing": options.POST_NMS_TOPK_TEST},
        nms_thresh=options.NMS_THRESH,
        smooth_l1_beta=options.SMOOTH_L1_BETA,
    )

    options, box, mask = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD
    branches = {
        "box_roi_pool": _roi_align(cfg, box),
        "box_head": box_head(
            channels,
            box.POOLER_RESOLUTION,
            num_conv=box.NUM_CONV,
            conv_dim=box.CONV_DIM,
            num_fc=box.NUM_FC,
            fc_dim=box.FC_DIM,
            norm=box.NORM,
            **roi_norm_options(cfg, box.NORM),
        ),
        "box_predictor": FastRCNNPredictor(box.FC_DIM, classes),
    }
    if cfg.MODEL.MASK_ON:
        branches |= {
            "mask_roi_pool": _roi_align(cfg, mask),
            "mask_head": mask_head(
                channels,
                num_conv=mask.NUM_CONV,
                conv_dim=mask.CONV_DIM,
                norm=mask.NORM,
                **roi_norm_options(cfg, mask.NORM),
            ),
            "mask_predictor": MaskRCNNPredictor(mask.CONV_DIM, mask.CONV_DIM, classes),
        }
    roi_heads = RoIHeads(
        **branches,
        shuffle_seed=cfg.SEED if options.SHUFFLE else None,
        smooth_l1_beta=box.SMOOTH_L1_BETA,
        fg_iou_thresh=options.IOU_THRESHOLDS[0],
        bg_iou_thresh=options.IOU_THRESHOLDS[0],
        batch_size_per_image=options.BATCH_SIZE_PER_IMAGE,
        positive_fraction=options.POSITIVE_FRACTION,
        bbox_reg_weights=None,
        score_thresh=options.SCORE_THRESH_TEST,
        nms_thresh=options.NMS_THRESH_TEST,
        detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    transform = Transform(
        cfg.INPUT.MIN_SIZE_TEST,
        cfg.INPUT.MAX_SIZE_TEST,
        list(cfg.MODEL.PIXEL_MEAN),
        list(cfg.MODEL.PIXEL_STD),
        _skip_resize=True,
    )
    return GeneralizedRCNN(backbone, rpn, roi_heads, transform)


def _roi_align(cfg: CfgNode, head: CfgNode) -> RoIAlign:
    """Features of P2 to P5 for a box or mask head."""
    levels = [str(k) for k in range(min(cfg.MODEL.FPN.NUM_LEVELS, 4))]
    aligned = head.POOLER_TYPE == "ROIAlignV2"
    return RoIAlign(levels, head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO, aligned=aligned)


def _anchors(cfg: CfgNode, octave_scales: int) -> AnchorGenerator:
    options = cfg.MODEL.ANCHOR_GENERATOR
    sizes = [[size * 2 ** (i / 3) for i in range(octave_scales)] for size in options.SIZES]
    ratios = (tuple(options.ASPECT_RATIOS),) * cfg.MODEL.FPN.NUM_LEVELS
    if options.ROUNDED:
        return AnchorGenerator(tuple(tuple(map(int, own)) for own in sizes), ratios)
    return ExactAnchorGenerator(tuple(map(tuple, sizes)), ratios)
