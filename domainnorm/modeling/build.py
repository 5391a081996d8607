"""A config -> a model."""

from fvcore.common.config import CfgNode
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

from ..config import UserError
from ..data import num_classes
from ..distributed import get_device
from .backbone import build_retinanet_backbone
from .retinanet import RetinaNet, RetinaNetHead
from .weights import initialize

NUM_LEVELS = 5  # P3 to P7


def build_model(cfg: CfgNode) -> nn.Module:
    """The detector of `cfg`, on this rank's device, with the weights of `MODEL.WEIGHTS`.

    In training `model(images, targets)` returns a dict of losses, in inference `model(images)` a list of detections;
    images are `(3, H, W)`, RGB in [0, 1].

    Raises:
        UserError: the weights do not fit, or the number of classes is neither given nor known from a data set.
    """
    model = _build_retinanet(cfg)
    initialize(model, cfg.MODEL.WEIGHTS)
    return model.to(get_device(cfg.MODEL.DEVICE))


def _build_retinanet(cfg: CfgNode) -> RetinaNet:
    options = cfg.MODEL.RETINANET
    sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    if len(sizes) != NUM_LEVELS:
        raise UserError(f"MODEL.ANCHOR_GENERATOR.SIZES takes {NUM_LEVELS} sizes, one a level, got {sizes}")
    anchors = AnchorGenerator(
        sizes=tuple((size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))) for size in sizes),
        aspect_ratios=(tuple(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS),) * NUM_LEVELS,
    )
    backbone = build_retinanet_backbone(cfg)
    classes = options.NUM_CLASSES or num_classes(cfg)
    head = RetinaNetHead(
        backbone.out_channels,
        anchors.num_anchors_per_location()[0],
        classes,
        num_levels=NUM_LEVELS,
        num_convs=options.NUM_CONVS,
        norm=options.NORM,
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
