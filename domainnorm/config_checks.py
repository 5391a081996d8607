"""What must hold of the options of a config, and between them."""

import difflib
import math
from typing import Any

from fvcore.common.config import CfgNode

from .config_values import iteration_of
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
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": ("smooth_l1", "giou"),
    "MODEL.ROI_BOX_HEAD.NORM": NORMS,
    "MODEL.ROI_MASK_HEAD.NORM": NORMS,
    "INPUT.CROP": ("random_resized", "padded", "none"),
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
    "INPUT.CROP_SIZE",
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
_ONLY_OF = {
    "MASK_ON": ("GeneralizedRCNN",),
    "FPN.NORM": ("RetinaNet", "GeneralizedRCNN"),
    "RETINANET.NORM": ("RetinaNet",),
    "ROI_HEADS.SHUFFLE": ("GeneralizedRCNN",),
    "ROI_BOX_HEAD.NORM": ("GeneralizedRCNN",),
    "ROI_MASK_HEAD.NORM": ("GeneralizedRCNN",),
}
_NOT_EMPTY = ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "INPUT.MIN_SIZE_TRAIN", "TEST.STATISTICS")


def _get(cfg: CfgNode, key: str) -> Any:
    node: Any = cfg
    for name in key.split("."):
        node = node[name]
    return node


def check(cfg: CfgNode, defaults: CfgNode) -> None:
    """Refuse what cannot hold of single values, then what cannot hold between keys.

    Raises:
        UserError: naming the key, what it got and what it takes.
    """
    of_detectors = {} if cfg.MODEL.META_ARCHITECTURE == "Classifier" else {"MODEL.BACKBONE.NAME": BACKBONES}
    for key, choices in (_CHOICES | of_detectors).items():
        if _get(cfg, key) not in choices:
            nearest = difflib.get_close_matches(str(_get(cfg, key)), [str(c) for c in choices], n=1, cutoff=0.0)[0]
            raise UserError(f"{key} takes one of {list(choices)}, got {_get(cfg, key)!r}; nearest: {nearest!r}")
    _check_numbers(cfg)
    for name in cfg.TEST.STATISTICS:
        if name not in STATISTICS:
            raise UserError(f"TEST.STATISTICS takes any of {list(STATISTICS)}, got {name!r}")

    _check_model(cfg.MODEL, defaults.MODEL)
    _check_batches(cfg)
    _check_solver(cfg)
    if cfg.TEST.EVAL_PERIOD and not cfg.DATASETS.TEST:
        raise UserError(
            f"TEST.EVAL_PERIOD {cfg.TEST.EVAL_PERIOD} contradicts DATASETS.TEST []: name a data set to evaluate on"
        )
    if cfg.TEST.EXAMPLE_WEIGHTS and set(cfg.TEST.STATISTICS) == {"minibatch"}:
        raise UserError(
            f"TEST.EXAMPLE_WEIGHTS {cfg.TEST.EXAMPLE_WEIGHTS} contradicts TEST.STATISTICS ['minibatch']: the weights "
            "are against population statistics; add population or recomputed"
        )
    weights, validation = cfg.TEST.EXAMPLE_WEIGHTS, cfg.TEST.EXAMPLE_WEIGHT_DATASET
    if (len(weights) > 1) != bool(validation):
        remedy = "name a data set to choose on" if not validation else "give several weights to choose from"
        raise UserError(
            f"TEST.EXAMPLE_WEIGHT_DATASET {validation!r} contradicts TEST.EXAMPLE_WEIGHTS {weights}: {remedy}"
        )
    if validation and validation in cfg.DATASETS.TEST:
        raise UserError(
            f"TEST.EXAMPLE_WEIGHT_DATASET {validation!r} is one of DATASETS.TEST: what is chosen on a data set cannot "
            "be tested on it; name another one"
        )
    for which, smallest in (("TRAIN", max(cfg.INPUT.MIN_SIZE_TRAIN)), ("TEST", cfg.INPUT.MIN_SIZE_TEST)):
        if smallest > cfg.INPUT[f"MAX_SIZE_{which}"]:
            raise UserError(
                f"INPUT.MIN_SIZE_{which} {smallest} contradicts INPUT.MAX_SIZE_{which} "
                f"{cfg.INPUT[f'MAX_SIZE_{which}']}: the shorter side cannot be longer than the longer one"
            )


def _check_model(model: CfgNode, defaults: CfgNode) -> None:
    head = model.RETINANET
    if head.NORM not in BATCH_NORMS:
        for name in ("SGD_STATISTICS", "POPULATION_STATISTICS", "AFFINE"):
            if head[name] != defaults.RETINANET[name]:
                raise UserError(
                    f"MODEL.RETINANET.{name} {head[name]!r} contradicts MODEL.RETINANET.NORM {head.NORM!r}: "
                    f"it is a choice of {' and '.join(BATCH_NORMS)}; set NORM to one of them or leave {name} out"
                )
    if not model.NORM.BRN.R_MAX >= 1:  # nan too
        raise UserError(f"MODEL.NORM.BRN.R_MAX takes a number from 1 on, got {model.NORM.BRN.R_MAX}")
    if model.META_ARCHITECTURE == "Classifier" and model.BACKBONE.FREEZE_AT not in (0, defaults.BACKBONE.FREEZE_AT):
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT {model.BACKBONE.FREEZE_AT} contradicts MODEL.META_ARCHITECTURE 'Classifier', "
            "all of whose layers are trained: leave it out"
        )
    if model.NORM.BRN.SYNC and model.NORM.BRN.GROUP_SIZE:
        raise UserError(
            f"MODEL.NORM.BRN.GROUP_SIZE {model.NORM.BRN.GROUP_SIZE} contradicts MODEL.NORM.BRN.SYNC True: "
            "micro-batches are of one process; leave one of them out"
        )
    # What chooses a batch must not be without effect.
    for key, architectures in _ONLY_OF.items():
        if model.META_ARCHITECTURE not in architectures and _get(model, key) != _get(defaults, key):
            raise UserError(
                f"MODEL.{key} {_get(model, key)!r} contradicts MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE!r}, "
                f"which has no use for it: leave {key} out, or choose {' or '.join(architectures)}"
            )
    if model.ROI_MASK_HEAD.NORM and not model.MASK_ON:
        raise UserError(
            f"MODEL.ROI_MASK_HEAD.NORM {model.ROI_MASK_HEAD.NORM!r} contradicts MODEL.MASK_ON False: "
            "set MASK_ON to True or leave the norm out"
        )
    if model.ROI_BOX_HEAD.NORM and not model.ROI_BOX_HEAD.NUM_CONV:
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.NORM {model.ROI_BOX_HEAD.NORM!r} contradicts MODEL.ROI_BOX_HEAD.NUM_CONV 0: the norm "
            "follows convolutions; for the paper's 4conv1fc head set NUM_CONV to 4 and NUM_FC to 1"
        )
    for name in ("RETINANET", "RPN"):
        if model[name].IOU_THRESHOLDS[0] > model[name].IOU_THRESHOLDS[1]:
            raise UserError(
                f"MODEL.{name}.IOU_THRESHOLDS takes two increasing numbers, got {model[name].IOU_THRESHOLDS}"
            )


def _check_batches(cfg: CfgNode) -> None:
    batches, classes = cfg.DATALOADER.BATCHES, cfg.DATALOADER.CLASSES_PER_BATCH
    if batches != "iid" and cfg.MODEL.META_ARCHITECTURE != "Classifier":
        raise UserError(
            f"DATALOADER.BATCHES {batches!r} contradicts MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r}: an "
            "image there has no one class; leave BATCHES out, or choose Classifier"
        )
    if batches.startswith("few_classes") != bool(classes):
        remedy = "leave it out, or set BATCHES to few_classes" if classes else "say how many classes a batch holds"
        raise UserError(f"DATALOADER.CLASSES_PER_BATCH {classes} contradicts DATALOADER.BATCHES {batches!r}: {remedy}")


def _check_solver(cfg: CfgNode) -> None:
    solver, renorm = cfg.SOLVER, cfg.MODEL.NORM.BRN
    begin = iteration_of(cfg, renorm.BN_UNTIL)
    for name in ("R_MAX_AT", "D_MAX_AT"):
        if begin and begin >= iteration_of(cfg, renorm[name]):
            raise UserError(
                f"MODEL.NORM.BRN.{name} {renorm[name]:g} contradicts MODEL.NORM.BRN.BN_UNTIL {renorm.BN_UNTIL:g}: of "
                f"{solver.MAX_ITER} iterations, the limits grow from the second to the first; make BN_UNTIL smaller"
            )
    if solver.WEIGHT_DECAY_NORM_TARGET and not solver.WEIGHT_DECAY_NORM:
        raise UserError(
            f"SOLVER.WEIGHT_DECAY_NORM_TARGET {solver.WEIGHT_DECAY_NORM_TARGET:g} contradicts SOLVER.WEIGHT_DECAY_NORM "
            "0, by which nothing decays: set that too, or leave it out"
        )
    if solver.LR_SCHEDULER == "cosine" and solver.STEPS:
        raise UserError(
            f"SOLVER.STEPS {solver.STEPS} contradicts SOLVER.LR_SCHEDULER 'cosine': "
            "leave STEPS empty or set LR_SCHEDULER to 'steps'"
        )
    if sorted(set(solver.STEPS)) != solver.STEPS:
        raise UserError(f"SOLVER.STEPS takes increasing iterations, got {solver.STEPS}")
    if solver.IMS_PER_BATCH % solver.ACCUMULATE:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} contradicts SOLVER.ACCUMULATE {solver.ACCUMULATE}: "
            "the second must divide the first"
        )
    if not solver.FREEZE_NORM_AT:
        for name in ("LAYERS", "RECOMPUTE", "AFFINE", "WARMUP_ITERS"):
            if solver[f"FREEZE_NORM_{name}"]:
                raise UserError(
                    f"SOLVER.FREEZE_NORM_{name} {solver[f'FREEZE_NORM_{name}']!r} contradicts SOLVER.FREEZE_NORM_AT 0, "
                    "which never freezes: say when, or leave it out"
                )
    if solver.AMP.ENABLED and solver.AMP.DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
        raise UserError("SOLVER.AMP.DTYPE 'float16' contradicts MODEL.DEVICE 'cpu': use bfloat16 there")


def _check_numbers(cfg: CfgNode) -> None:
    for keys, expected, holds in (
        (_POSITIVE, "above 0", lambda v: 0 < v < math.inf),
        (_NOT_NEGATIVE, "from 0 on", lambda v: 0 <= v < math.inf),
        (_SHARES, "from 0 to 1", lambda v: 0 <= v <= 1),
    ):
        for key in keys:
            value = _get(cfg, key)
            if not all(holds(v) for v in (value if isinstance(value, list) else [value])):
                raise UserError(f"{key} takes a number {expected}, got {value!r}")
    for key, length in _LENGTHS.items():
        if len(_get(cfg, key)) != length:
            raise UserError(f"{key} takes {length} numbers, got {_get(cfg, key)!r}")
    for key in _NOT_EMPTY:
        if not _get(cfg, key):
            raise UserError(f"{key} takes at least one, got []")
