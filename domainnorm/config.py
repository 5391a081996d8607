"""Every option with its default; loading, overriding and checking a config.

Names follow detectron2 where it has one. `load_config` is the only way in: it merges `_BASE_` files, applies
command-line overrides and refuses unknown keys, wrong types and keys that contradict each other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from .config_checks import check
from .config_values import leaves, read_yaml, set_value
from .errors import UserError

_C = CfgNode()

_C.OUTPUT_DIR = "./output"  # checkpoints, logs and results of this run
_C.SEED = 0  # of weights, sampling and augmentation; a CPU run is repeatable to the bit on one machine

_C.MODEL = CfgNode()
_C.MODEL.META_ARCHITECTURE = "RetinaNet"  # "RetinaNet" | "GeneralizedRCNN" (Faster and Mask R-CNN) | "Classifier"
_C.MODEL.DEVICE = "auto"  # "cuda", "cpu", or "auto": cuda where there is one
# "" (random), a file, or the name of torchvision weights such as "ResNet50_Weights.IMAGENET1K_V2"
_C.MODEL.WEIGHTS = ""
_C.MODEL.MASK_ON = False  # of GeneralizedRCNN: also predict masks (Mask R-CNN)
_C.MODEL.PIXEL_MEAN = [0.485, 0.456, 0.406]  # RGB, of images in [0, 1]
_C.MODEL.PIXEL_STD = [0.229, 0.224, 0.225]  # RGB, of images in [0, 1]

_C.MODEL.BACKBONE = CfgNode()
# resnet18, resnet34, resnet50, resnet101, mobilenet_v3_large or mobilenet_v3_small. Of a Classifier also any other name
# of torchvision.models, cifar_resnet18, cifar_resnet20 (any 6n + 2), or timm/NAME
_C.MODEL.BACKBONE.NAME = "resnet50"
# "", BN, SyncBN, GN, FrozenBN, GhostBN, SeqNorm, BGN, GBGN or BRN; their options are in MODEL.NORM
_C.MODEL.BACKBONE.NORM = "FrozenBN"
_C.MODEL.BACKBONE.FREEZE_AT = 2  # of detectors; 0: train all; 1: freeze the stem; k: also the k-1 stages after it

# Options of the norms, wherever one of them is chosen. Numbers of channel groups become their greatest common divisor
# with the channels of a layer.
_C.MODEL.NORM = CfgNode()
_C.MODEL.NORM.GN = CfgNode()
_C.MODEL.NORM.GN.NUM_GROUPS = 32  # channel groups
_C.MODEL.NORM.GHOSTBN = CfgNode()
_C.MODEL.NORM.GHOSTBN.GROUP_SIZE = 16  # samples normalized together, of the images (or RoIs) of one process
_C.MODEL.NORM.SEQNORM = CfgNode()
_C.MODEL.NORM.SEQNORM.CHANNEL_GROUPS = 4  # of its GroupNorm
_C.MODEL.NORM.SEQNORM.BATCH_GROUPS = 8  # groups of samples of its GhostBN
_C.MODEL.NORM.BGN = CfgNode()
_C.MODEL.NORM.BGN.NUM_GROUPS = 16  # pieces of the flattened features
_C.MODEL.NORM.BGN.SPLIT_SPACE = False  # take NUM_GROUPS as it is, and pieces of channels: for one feature size only
_C.MODEL.NORM.BGN.SYNC = False  # over all processes
_C.MODEL.NORM.GBGN = CfgNode()
_C.MODEL.NORM.GBGN.CHANNEL_GROUPS = 32  # normalized apart
_C.MODEL.NORM.GBGN.EXAMPLES_PER_GROUP = 2  # samples normalized together
_C.MODEL.NORM.BRN = CfgNode()
_C.MODEL.NORM.BRN.R_MAX = 3.0  # limit of the correction of the standard deviation
_C.MODEL.NORM.BRN.D_MAX = 5.0  # limit of the correction of the mean, in standard deviations
# Iterations, or below 1 shares of MAX_ITER: BatchNorm until BN_UNTIL, then the limits grow linearly. Batch Renorm's
# own 5k, 40k and 25k of 130k steps.
_C.MODEL.NORM.BRN.BN_UNTIL = 0.04  # 0 with R_MAX_AT 0: the limits hold from the first step
_C.MODEL.NORM.BRN.R_MAX_AT = 0.3  # when R_MAX is reached
_C.MODEL.NORM.BRN.D_MAX_AT = 0.2  # when D_MAX is reached
_C.MODEL.NORM.BRN.MOMENTUM = 0.01  # of its moving averages, in torch's meaning
_C.MODEL.NORM.BRN.GROUP_SIZE = 0  # samples of a micro-batch; 0: all of a process
_C.MODEL.NORM.BRN.SYNC = False  # over all processes

_C.MODEL.FPN = CfgNode()
_C.MODEL.FPN.OUT_CHANNELS = 256  # of every pyramid level and of the head
_C.MODEL.FPN.NORM = ""  # as BACKBONE.NORM

_C.MODEL.ANCHOR_GENERATOR = CfgNode()
# pixels, one a level; RetinaNet has 3 octave scales of each
_C.MODEL.ANCHOR_GENERATOR.SIZES = [32, 64, 128, 256, 512]
_C.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [0.5, 1.0, 2.0]  # height / width, at every size

_C.MODEL.RETINANET = CfgNode()
_C.MODEL.RETINANET.NUM_CLASSES = 0  # 0: as many as the training set has categories
_C.MODEL.RETINANET.NUM_CONVS = 4  # in each of the two towers
_C.MODEL.RETINANET.NORM = ""  # of the towers, as BACKBONE.NORM
# Table 5 of Rethinking "Batch" in BatchNorm; the domains are the pyramid levels
_C.MODEL.RETINANET.SGD_STATISTICS = "per_domain"  # "shared" | "per_domain"
_C.MODEL.RETINANET.POPULATION_STATISTICS = "per_domain"  # "shared" | "per_domain"
_C.MODEL.RETINANET.AFFINE = "shared"  # "shared" | "per_domain" | "" (no affine)
_C.MODEL.RETINANET.PRIOR_PROB = 0.01  # of foreground, at the first step
_C.MODEL.RETINANET.IOU_THRESHOLDS = [0.4, 0.5]  # below: background; from the second on: foreground
_C.MODEL.RETINANET.FOCAL_LOSS_ALPHA = 0.25  # weight of foreground against background
_C.MODEL.RETINANET.FOCAL_LOSS_GAMMA = 2.0  # how much less well-classified anchors weigh
_C.MODEL.RETINANET.BBOX_REG_LOSS_TYPE = "smooth_l1"  # "smooth_l1" | "giou"
_C.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA = 0.1  # from quadratic to linear, in units of the box code
_C.MODEL.RETINANET.SCORE_THRESH_TEST = 0.05  # detections below it are dropped
_C.MODEL.RETINANET.NMS_THRESH_TEST = 0.5  # IoU, within a class
_C.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 1000  # a level, before NMS

_C.MODEL.RPN = CfgNode()
_C.MODEL.RPN.NUM_CONV = 1  # 3x3 convolutions of FPN.OUT_CHANNELS channels before the predictions
_C.MODEL.RPN.IOU_THRESHOLDS = [0.3, 0.7]  # of anchors; below: background; from the second on: foreground
_C.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 256  # anchors sampled for the loss
_C.MODEL.RPN.POSITIVE_FRACTION = 0.5  # of them, at most
_C.MODEL.RPN.PRE_NMS_TOPK_TRAIN = 2000  # a level
_C.MODEL.RPN.PRE_NMS_TOPK_TEST = 1000  # a level
_C.MODEL.RPN.POST_NMS_TOPK_TRAIN = 1000  # an image
_C.MODEL.RPN.POST_NMS_TOPK_TEST = 1000  # an image
_C.MODEL.RPN.NMS_THRESH = 0.7  # IoU, within a level

_C.MODEL.ROI_HEADS = CfgNode()
_C.MODEL.ROI_HEADS.NUM_CLASSES = 0  # 0: as many as the training set has categories
_C.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 512  # RoIs sampled for training
_C.MODEL.ROI_HEADS.POSITIVE_FRACTION = 0.25  # of them, at most
_C.MODEL.ROI_HEADS.IOU_THRESHOLDS = [0.5]  # of RoIs; from it on: foreground
_C.MODEL.ROI_HEADS.SHUFFLE = False  # train the heads on RoIs randomly permuted over the ranks (Rethinking, 6.1)
_C.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.05  # detections below it are dropped
_C.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.5  # IoU, within a class

# The paper's 4conv1fc: NUM_CONV 4, NUM_FC 1
_C.MODEL.ROI_BOX_HEAD = CfgNode()
_C.MODEL.ROI_BOX_HEAD.NUM_CONV = 0  # 3x3 convolutions, each followed by the norm
_C.MODEL.ROI_BOX_HEAD.CONV_DIM = 256  # their channels
_C.MODEL.ROI_BOX_HEAD.NUM_FC = 2  # linear layers after them
_C.MODEL.ROI_BOX_HEAD.FC_DIM = 1024  # their features
_C.MODEL.ROI_BOX_HEAD.NORM = ""  # of the convolutions, as BACKBONE.NORM
_C.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7  # height and width of a RoI's features

_C.MODEL.ROI_MASK_HEAD = CfgNode()
_C.MODEL.ROI_MASK_HEAD.NUM_CONV = 4  # 3x3 convolutions, each followed by the norm
_C.MODEL.ROI_MASK_HEAD.CONV_DIM = 256  # their channels
_C.MODEL.ROI_MASK_HEAD.NORM = ""  # of the convolutions, as BACKBONE.NORM
_C.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 14  # height and width of a RoI's features; a mask has twice that

_C.MODEL.CLASSIFIER = CfgNode()
_C.MODEL.CLASSIFIER.NUM_CLASSES = 0  # 0: as many as the training set has classes

_C.INPUT = CfgNode()
_C.INPUT.MIN_SIZE_TRAIN = [800]  # pixels, of the shorter side; one is drawn for each image
_C.INPUT.MAX_SIZE_TRAIN = 1333  # pixels, of the longer side
_C.INPUT.MIN_SIZE_TEST = 800  # pixels, of the shorter side
_C.INPUT.MAX_SIZE_TEST = 1333  # pixels, of the longer side
_C.INPUT.RANDOM_FLIP = 0.5  # probability of a horizontal flip
_C.INPUT.CROP_SIZE = 224  # pixels, side of a classifier's square images
# Of a classifier's training images: "random_resized" (ImageNet's) | "padded" (CIFAR's: by CROP_SIZE // 8 zeros on each
# side, then any CROP_SIZE square) | "none"
_C.INPUT.CROP = "random_resized"

_C.DATASETS = CfgNode()
# names (shapes_train, coco_2017_train, …) or "annotations.json:image_folder"; of a classifier: patches_train, a folder
# with one subfolder for each class, "file.npz", or "images-idx3-ubyte:labels-idx1-ubyte"
_C.DATASETS.TRAIN = []
_C.DATASETS.TEST = []  # evaluated one by one

_C.DATALOADER = CfgNode()
_C.DATALOADER.NUM_WORKERS = 2  # processes, for each rank; 0 loads in the main process
_C.DATALOADER.ASPECT_RATIO_GROUPING = True  # a batch holds either wide or tall images
_C.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True  # train without the images that have no object
_C.DATALOADER.INVALID_BOXES = "error"  # "error" | "skip": boxes outside the image or of no area
# What a classifier's normalization batch is made of: "iid" | "few_classes" (CLASSES_PER_BATCH random ones, as many
# images of each) | "few_classes_in_rounds" (the same images, each so many in turn hold each class once) |
# "class_disjoint_halves" (no class of its first half is in its second)
_C.DATALOADER.BATCHES = "iid"
_C.DATALOADER.CLASSES_PER_BATCH = 0  # of few_classes and few_classes_in_rounds

_C.SOLVER = CfgNode()
_C.SOLVER.IMS_PER_BATCH = 16  # images in one SGD step, over all ranks
# Backward passes in one step, each on an equal share of the images. The normalization batch is one share:
# accumulation does not enlarge it (App. A.5).
_C.SOLVER.ACCUMULATE = 1
_C.SOLVER.OPTIMIZER = "SGD"  # "SGD" | "AdamW"
_C.SOLVER.BASE_LR = 0.01  # after warm-up
_C.SOLVER.MOMENTUM = 0.9  # of SGD
_C.SOLVER.NESTEROV = False  # of SGD
_C.SOLVER.LR_SCHEDULER = "steps"  # "steps" | "cosine"
_C.SOLVER.STEPS = []  # iterations at which the learning rate is multiplied by GAMMA
_C.SOLVER.GAMMA = 0.1  # factor at each of STEPS
_C.SOLVER.MAX_ITER = 90000  # SGD steps
_C.SOLVER.WARMUP_ITERS = 1000  # linear, from BASE_LR * WARMUP_FACTOR
_C.SOLVER.WARMUP_FACTOR = 0.001  # of BASE_LR, at the first step
_C.SOLVER.WEIGHT_DECAY = 1e-4  # of all weights but those below
_C.SOLVER.WEIGHT_DECAY_NORM = 0.0  # of γ and β in norm layers
_C.SOLVER.WEIGHT_DECAY_NORM_TARGET = 0.0  # what γ decays to, 0 or 1 (Four Things, 3.3); β always to 0
_C.SOLVER.WEIGHT_DECAY_BIAS = 1e-4  # of all other biases
# Iteration, or below 1 share of MAX_ITER, from which norm layers keep their statistics (Rethinking, 4.3); 0: never
_C.SOLVER.FREEZE_NORM_AT = 0.0
_C.SOLVER.FREEZE_NORM_LAYERS = []  # beginnings of module names, such as "backbone."; []: all layers
_C.SOLVER.FREEZE_NORM_RECOMPUTE = False  # freeze recomputed statistics, by TEST.RECOMPUTE, not the EMA
_C.SOLVER.FREEZE_NORM_AFFINE = False  # also stop training their weight and bias
_C.SOLVER.FREEZE_NORM_WARMUP_ITERS = 0  # linear, after the switch, from WARMUP_FACTOR
# "" | "EMA" | "SWA": also average the weights; what is evaluated is the average, with statistics recomputed for it
_C.SOLVER.AVERAGE_WEIGHTS = ""
_C.SOLVER.AVERAGE_WEIGHTS_FROM = 0.0  # iteration, or below 1 share of MAX_ITER, at which the average begins
_C.SOLVER.AVERAGE_WEIGHTS_DECAY = 0.999  # of EMA, for each step
_C.SOLVER.CHECKPOINT_PERIOD = 5000  # iterations
_C.SOLVER.AMP = CfgNode()
_C.SOLVER.AMP.ENABLED = False  # autocast; norm statistics stay float32
_C.SOLVER.AMP.DTYPE = "bfloat16"  # "bfloat16" | "float16" (CUDA, with loss scaling)
_C.SOLVER.CLIP_GRADIENTS = CfgNode()
_C.SOLVER.CLIP_GRADIENTS.ENABLED = False  # before each step
_C.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"  # "norm": of all gradients together | "value": each element
_C.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0  # the largest norm, or absolute value

_C.TEST = CfgNode()
# any of population, minibatch, recomputed: each is evaluated, side by side
_C.TEST.STATISTICS = ["population"]
_C.TEST.RECOMPUTE = CfgNode()  # population statistics for "recomputed", of the model as it is
_C.TEST.RECOMPUTE.NUM_SAMPLES = 1000  # images, over all ranks
_C.TEST.RECOMPUTE.METHOD = "pooled"  # "pooled" | "mean_of_variances" | "exact"
_C.TEST.RECOMPUTE.DATASET = ""  # "": DATASETS.TRAIN; another one is the target domain (Rethinking, 5.1)
_C.TEST.RECOMPUTE.IN_CHECKPOINT = False  # at the end of training, also replace the model's own by them
# α of inference example weighing (Four Things, 3.1): results are given with it too, beside those without. Of several,
# the best on EXAMPLE_WEIGHT_DATASET is taken; [] for none
_C.TEST.EXAMPLE_WEIGHTS = []
_C.TEST.EXAMPLE_WEIGHT_DATASET = ""  # a validation set that is none of DATASETS.TEST
_C.TEST.EVAL_PERIOD = 0  # iterations; 0: only after training
_C.TEST.IMS_PER_BATCH = 1  # images loaded together, for each rank; results do not depend on it
_C.TEST.DETECTIONS_PER_IMAGE = 100  # the best, over all classes

# Every key with a default; of a list, with an element.
_KNOWN = dict(leaves(_C)) | {
    "DATASETS.TEST": [""],
    "DATASETS.TRAIN": [""],
    "SOLVER.FREEZE_NORM_LAYERS": [""],
    "SOLVER.STEPS": [0],
    "TEST.EXAMPLE_WEIGHTS": [0.0],
}


def load_config(file: str | Path | None = None, overrides: Sequence[Any] = ()) -> CfgNode:
    """The defaults, then `file` (and its `_BASE_` files), then `overrides` (`[KEY, VALUE, KEY, VALUE, …]`).

    Returns a frozen config. Values in `overrides` may be strings, as on a command line, or Python values.

    Raises:
        UserError: unknown key (naming the nearest known one), wrong type, value outside its choices,
            contradicting keys, missing or broken file.
    """
    cfg = _C.clone()
    if file is not None:
        for key, value in leaves(read_yaml(Path(file))):
            set_value(cfg, key, value, _KNOWN, str(file))
    if len(overrides) % 2:
        raise UserError(f"overrides: expected KEY VALUE pairs, got {len(overrides)} words: {list(overrides)}")
    for key, value in zip(overrides[0::2], overrides[1::2], strict=True):
        set_value(cfg, str(key), value, _KNOWN, "overrides")
    check(cfg, _C)
    cfg.freeze()
    return cfg


def save_config(cfg: CfgNode, file: str | Path) -> None:
    """Write `cfg` as YAML that `load_config` reads back to an equal config."""
    Path(file).write_text(cfg.dump(), encoding="utf-8")
