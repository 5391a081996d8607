"""What each option of a config may be."""

import difflib
import math
from typing import Any

from fvcore.common.config import CfgNode

from .errors import UserError

BATCH_NORMS = ("BN", "SyncBN", "GhostBN", "SeqNorm", "BGN", "GBGN", "BRN")
NORMS = ("", "GN", "FrozenBN", *BATCH_NORMS)
STATISTICS = ("population", "minibatch", "recomputed")
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v3_large", "mobilenet_v3_small")

_CHOICES = {
    "MODEL.DEVICE": ("auto", "cuda", "cpu"),
    "MODEL.META_ARCHITECTURE": ("RetinaNet", "GeneralizedRCNN", "Classifier"),
    "MODEL.BACKBONE.NORM": NORMS,
    "MODEL.FPN.NORM": NORMS,
    "MODEL.RETINANET.NORM": NORMS,
    "MODEL.RETINANET.SGD_STATISTICS": ("shared", "per_domain"),
    "MODEL.RETINANET.POPULATION_STATISTICS": ("shared", "per_domain"),
    "MODEL.RETINANET.AFFINE": ("shared", "per_domain", ""),
    "MODEL.RETINANET.NORM_DOMAINS": ("level", "dataset", "level_and_dataset"),
    "MODEL.NORM_DOMAINS": ("", "dataset"),
    "MODEL.DATASET_NORM.SGD_STATISTICS": ("shared", "per_domain"),
    "MODEL.DATASET_NORM.POPULATION_STATISTICS": ("shared", "per_domain"),
    "MODEL.DATASET_NORM.AFFINE": ("shared", "per_domain", ""),
    "TEST.DOMAIN": ("given", "nearest", "average"),
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": ("smooth_l1", "giou"),
    "MODEL.ROI_BOX_HEAD.NORM": NORMS,
    "MODEL.ROI_MASK_HEAD.NORM": NORMS,
    "INPUT.CROP": ("random_resized", "padded", "none"),
    "DATASETS.LABELS": ("equal", "union"),
    "DATALOADER.COMPOSITION": ("mixed", "one_domain_per_rank", "one_domain_per_batch"),
    "DATALOADER.INVALID_BOXES": ("error", "skip"),
    "DATALOADER.BATCHES": ("iid", "few_classes", "few_classes_in_rounds", "class_disjoint_halves"),
    "SOLVER.OPTIMIZER": ("SGD", "AdamW"),
    "SOLVER.LR_SCHEDULER": ("steps", "cosine"),
    "SOLVER.AMP.DTYPE": ("bfloat16", "float16"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("norm", "value"),
    "SOLVER.AVERAGE_WEIGHTS": ("", "EMA", "SWA"),
    "SOLVER.WEIGHT_DECAY_NORM_TARGET": (0.0, 1.0),
    "TEST.RECOMPUTE.METHOD": ("pooled", "mean_of_variances", "exact"),
}

# Of numbers, and of each number in a list: above 0; not below 0; from 0 to 1.
_POSITIVE = (
    *("MODEL.PIXEL_STD", "MODEL.FPN.OUT_CHANNELS", "MODEL.ANCHOR_GENERATOR.SIZES"),
    *("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "MODEL.RETINANET.PRIOR_PROB"),
    "MODEL.RPN.NUM_CONV",
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "MODEL.RPN.PRE_NMS_TOPK_TEST"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "MODEL.RPN.POST_NMS_TOPK_TEST", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "MODEL.ROI_BOX_HEAD.NUM_FC", "MODEL.ROI_BOX_HEAD.FC_DIM"),
    *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "MODEL.ROI_MASK_HEAD.NUM_CONV", "MODEL.ROI_MASK_HEAD.CONV_DIM"),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST", "SOLVER.IMS_PER_BATCH"),
    *("SOLVER.ACCUMULATE", "SOLVER.BASE_LR", "SOLVER.STEPS", "SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD"),
    *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "TEST.IMS_PER_BATCH", "TEST.DETECTIONS_PER_IMAGE"),
    *("TEST.RECOMPUTE.NUM_SAMPLES", "MODEL.NORM.GN.NUM_GROUPS", "MODEL.NORM.GHOSTBN.GROUP_SIZE"),
    *("MODEL.NORM.SEQNORM.CHANNEL_GROUPS", "MODEL.NORM.SEQNORM.BATCH_GROUPS", "MODEL.NORM.BGN.NUM_GROUPS"),
    *("MODEL.NORM.GBGN.CHANNEL_GROUPS", "MODEL.NORM.GBGN.EXAMPLES_PER_GROUP"),
    *("INPUT.CROP_SIZE", "DATALOADER.RATIOS"),
)
_NOT_NEGATIVE = (
    *("SEED", "MODEL.BACKBONE.FREEZE_AT", "MODEL.RETINANET.NUM_CLASSES", "MODEL.RETINANET.NUM_CONVS"),
    *("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_BOX_HEAD.NUM_CONV"),
    *("DATALOADER.NUM_WORKERS", "SOLVER.WARMUP_ITERS", "SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_NORM"),
    *("SOLVER.WEIGHT_DECAY_BIAS", "SOLVER.FREEZE_NORM_AT", "SOLVER.FREEZE_NORM_WARMUP_ITERS", "TEST.EVAL_PERIOD"),
    *("SOLVER.AVERAGE_WEIGHTS_FROM", "MODEL.NORM.BRN.D_MAX", "MODEL.NORM.BRN.BN_UNTIL", "MODEL.NORM.BRN.R_MAX_AT"),
    *("MODEL.NORM.BRN.D_MAX_AT", "MODEL.NORM.BRN.GROUP_SIZE"),
    *("MODEL.CLASSIFIER.NUM_CLASSES", "DATALOADER.CLASSES_PER_BATCH"),
)
_SHARES = (
    *("MODEL.RETINANET.PRIOR_PROB", "MODEL.RETINANET.IOU_THRESHOLDS", "MODEL.RETINANET.SCORE_THRESH_TEST"),
    *("MODEL.RETINANET.NMS_THRESH_TEST", "MODEL.RPN.IOU_THRESHOLDS", "MODEL.RPN.POSITIVE_FRACTION"),
    *("MODEL.RPN.NMS_THRESH", "MODEL.ROI_HEADS.POSITIVE_FRACTION", "MODEL.ROI_HEADS.IOU_THRESHOLDS"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "MODEL.ROI_HEADS.NMS_THRESH_TEST", "INPUT.RANDOM_FLIP", "SOLVER.MOMENTUM"),
    *("TEST.EXAMPLE_WEIGHTS", "SOLVER.WARMUP_FACTOR", "SOLVER.AVERAGE_WEIGHTS_DECAY", "MODEL.NORM.BRN.MOMENTUM"),
)
_LENGTHS = {
    "MODEL.PIXEL_MEAN": 3,
    "MODEL.PIXEL_STD": 3,
    "MODEL.RETINANET.IOU_THRESHOLDS": 2,
    "MODEL.RPN.IOU_THRESHOLDS": 2,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": 1,
}
# Keys under MODEL that choose a batch, with the architectures that have a use for them.
ONLY_OF = {
    "MASK_ON": ("GeneralizedRCNN",),
    "FPN.NORM": ("RetinaNet", "GeneralizedRCNN"),
    "RETINANET.NORM": ("RetinaNet",),
    "ROI_HEADS.SHUFFLE": ("GeneralizedRCNN",),
    "ROI_BOX_HEAD.NORM": ("GeneralizedRCNN",),
    "ROI_MASK_HEAD.NORM": ("GeneralizedRCNN",),
}
_NOT_EMPTY = ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "INPUT.MIN_SIZE_TRAIN", "TEST.STATISTICS")


def get_value(cfg: CfgNode, key: str) -> Any:
    """The option `KEY.SUBKEY`."""
    node: Any = cfg
    for name in key.split("."):
        node = node[name]
    return node


def check_values(cfg: CfgNode) -> None:
    """Refuse what cannot hold of single options.

    Raises:
        UserError: naming the key, what it got and what it takes.
    """
    of_detectors = {} if cfg.MODEL.META_ARCHITECTURE == "Classifier" else {"MODEL.BACKBONE.NAME": BACKBONES}
    for key, choices in (_CHOICES | of_detectors).items():
        if get_value(cfg, key) not in choices:
            nearest = difflib.get_close_matches(str(get_value(cfg, key)), [str(c) for c in choices], n=1, cutoff=0.0)[0]
            raise UserError(f"{key} takes one of {list(choices)}, got {get_value(cfg, key)!r}; nearest: {nearest!r}")
    for name in cfg.TEST.STATISTICS:
        if name not in STATISTICS:
            raise UserError(f"TEST.STATISTICS takes any of {list(STATISTICS)}, got {name!r}")
    for keys, expected, holds in (
        (_POSITIVE, "above 0", lambda v: 0 < v < math.inf),
        (_NOT_NEGATIVE, "from 0 on", lambda v: 0 <= v < math.inf),
        (_SHARES, "from 0 to 1", lambda v: 0 <= v <= 1),
    ):
        for key in keys:
            value = get_value(cfg, key)
            if not all(holds(v) for v in (value if isinstance(value, list) else [value])):
                raise UserError(f"{key} takes a number {expected}, got {value!r}")
    for key, length in _LENGTHS.items():
        if len(get_value(cfg, key)) != length:
            raise UserError(f"{key} takes {length} numbers, got {get_value(cfg, key)!r}")
    for key in _NOT_EMPTY:
        if not get_value(cfg, key):
            raise UserError(f"{key} takes at least one, got []")
