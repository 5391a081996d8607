"""Every option with its default; loading, overriding and checking a config.

Names follow detectron2 where it has one. `load_config` is the only way in: it merges `_BASE_` files, applies
command-line overrides and refuses unknown keys, wrong types and keys that contradict each other.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode


class UserError(ValueError):
    """A mistake in what the user gave (config, data, checkpoint): one line that says what to do. Exit code 2."""


_C = CfgNode()

_C.OUTPUT_DIR = "./output"  # checkpoints, logs and results of this run
_C.SEED = 0  # of weights, sampling and augmentation; a CPU run is repeatable to the bit on one machine

_C.MODEL = CfgNode()
_C.MODEL.META_ARCHITECTURE = "RetinaNet"  # the only one so far
_C.MODEL.DEVICE = "auto"  # "cuda", "cpu", or "auto": cuda where there is one
# "" (random), a file, or the name of torchvision weights such as "ResNet50_Weights.IMAGENET1K_V2"
_C.MODEL.WEIGHTS = ""
_C.MODEL.PIXEL_MEAN = [0.485, 0.456, 0.406]  # RGB, of images in [0, 1]
_C.MODEL.PIXEL_STD = [0.229, 0.224, 0.225]  # RGB, of images in [0, 1]

_C.MODEL.BACKBONE = CfgNode()
# resnet18, resnet34, resnet50, resnet101, mobilenet_v3_large or mobilenet_v3_small
_C.MODEL.BACKBONE.NAME = "resnet50"
_C.MODEL.BACKBONE.NORM = "FrozenBN"  # "", BN, SyncBN, GN, FrozenBN
_C.MODEL.BACKBONE.FREEZE_AT = 2  # 0: train all; 1: freeze the stem; k: also the k-1 stages after it

_C.MODEL.FPN = CfgNode()
_C.MODEL.FPN.OUT_CHANNELS = 256  # of every pyramid level and of the head
_C.MODEL.FPN.NORM = ""  # as BACKBONE.NORM

_C.MODEL.ANCHOR_GENERATOR = CfgNode()
_C.MODEL.ANCHOR_GENERATOR.SIZES = [32, 64, 128, 256, 512]  # pixels, one a level; at 3 octave scales each
_C.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [0.5, 1.0, 2.0]  # height / width, at every size

_C.MODEL.RETINANET = CfgNode()
_C.MODEL.RETINANET.NUM_CLASSES = 0  # 0: as many as the training set has categories
_C.MODEL.RETINANET.NUM_CONVS = 4  # in each of the two towers
_C.MODEL.RETINANET.NORM = ""  # of the towers: "", BN, SyncBN, GN, FrozenBN
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

_C.INPUT = CfgNode()
_C.INPUT.MIN_SIZE_TRAIN = [800]  # pixels, of the shorter side; one is drawn for each image
_C.INPUT.MAX_SIZE_TRAIN = 1333  # pixels, of the longer side
_C.INPUT.MIN_SIZE_TEST = 800  # pixels, of the shorter side
_C.INPUT.MAX_SIZE_TEST = 1333  # pixels, of the longer side
_C.INPUT.RANDOM_FLIP = 0.5  # probability of a horizontal flip

_C.DATASETS = CfgNode()
# names (shapes_train, coco_2017_train, …) or "annotations.json:image_folder"
_C.DATASETS.TRAIN = []
_C.DATASETS.TEST = []  # evaluated one by one

_C.DATALOADER = CfgNode()
_C.DATALOADER.NUM_WORKERS = 2  # processes, for each rank; 0 loads in the main process
_C.DATALOADER.ASPECT_RATIO_GROUPING = True  # a batch holds either wide or tall images
_C.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True  # train without the images that have no object
_C.DATALOADER.INVALID_BOXES = "error"  # "error" | "skip": boxes outside the image or of no area

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
_C.SOLVER.WEIGHT_DECAY_BIAS = 1e-4  # of all other biases
_C.SOLVER.CHECKPOINT_PERIOD = 5000  # iterations
_C.SOLVER.AMP = CfgNode()
_C.SOLVER.AMP.ENABLED = False  # autocast; norm statistics stay float32
_C.SOLVER.AMP.DTYPE = "bfloat16"  # "bfloat16" | "float16" (CUDA, with loss scaling)
_C.SOLVER.CLIP_GRADIENTS = CfgNode()
_C.SOLVER.CLIP_GRADIENTS.ENABLED = False  # before each step
_C.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"  # "norm": of all gradients together | "value": each element
_C.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0  # the largest norm, or absolute value

_C.TEST = CfgNode()
_C.TEST.STATISTICS = ["population"]  # any of population, minibatch: each is evaluated, side by side
_C.TEST.EVAL_PERIOD = 0  # iterations; 0: only after training
_C.TEST.IMS_PER_BATCH = 1  # images loaded together, for each rank; results do not depend on it
_C.TEST.DETECTIONS_PER_IMAGE = 100  # the best, over all classes

NORMS = ("", "BN", "SyncBN", "GN", "FrozenBN")
BATCH_NORMS = ("BN", "SyncBN")
STATISTICS = ("population", "minibatch")
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v3_large", "mobilenet_v3_small")

_CHOICES = {
    "MODEL.DEVICE": ("auto", "cuda", "cpu"),
    "MODEL.META_ARCHITECTURE": ("RetinaNet",),
    "MODEL.BACKBONE.NAME": BACKBONES,
    "MODEL.BACKBONE.NORM": NORMS,
    "MODEL.FPN.NORM": NORMS,
    "MODEL.RETINANET.NORM": NORMS,
    "MODEL.RETINANET.SGD_STATISTICS": ("shared", "per_domain"),
    "MODEL.RETINANET.POPULATION_STATISTICS": ("shared", "per_domain"),
    "MODEL.RETINANET.AFFINE": ("shared", "per_domain", ""),
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": ("smooth_l1", "giou"),
    "DATALOADER.INVALID_BOXES": ("error", "skip"),
    "SOLVER.OPTIMIZER": ("SGD", "AdamW"),
    "SOLVER.LR_SCHEDULER": ("steps", "cosine"),
    "SOLVER.AMP.DTYPE": ("bfloat16", "float16"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("norm", "value"),
}

# Of numbers, and of each number in a list: above 0; not below 0; from 0 to 1.
_POSITIVE = (
    *("MODEL.PIXEL_STD", "MODEL.FPN.OUT_CHANNELS", "MODEL.ANCHOR_GENERATOR.SIZES"),
    *("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "MODEL.RETINANET.PRIOR_PROB"),
    *("INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST", "SOLVER.IMS_PER_BATCH", "SOLVER.ACCUMULATE", "SOLVER.BASE_LR"),
    *("SOLVER.STEPS", "SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE"),
    *("TEST.IMS_PER_BATCH", "TEST.DETECTIONS_PER_IMAGE"),
)
_NOT_NEGATIVE = (
    *("SEED", "MODEL.BACKBONE.FREEZE_AT", "MODEL.RETINANET.NUM_CLASSES", "MODEL.RETINANET.NUM_CONVS"),
    *("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", "DATALOADER.NUM_WORKERS", "SOLVER.WARMUP_ITERS", "SOLVER.WEIGHT_DECAY"),
    *("SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS", "TEST.EVAL_PERIOD"),
)
_SHARES = (
    *("MODEL.RETINANET.PRIOR_PROB", "MODEL.RETINANET.IOU_THRESHOLDS", "MODEL.RETINANET.SCORE_THRESH_TEST"),
    *("MODEL.RETINANET.NMS_THRESH_TEST", "INPUT.RANDOM_FLIP", "SOLVER.MOMENTUM", "SOLVER.WARMUP_FACTOR"),
)
_LENGTHS = {"MODEL.PIXEL_MEAN": 3, "MODEL.PIXEL_STD": 3, "MODEL.RETINANET.IOU_THRESHOLDS": 2}
_NOT_EMPTY = ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "INPUT.MIN_SIZE_TRAIN", "TEST.STATISTICS")
_ELEMENTS = {"SOLVER.STEPS": 0, "DATASETS.TRAIN": "", "DATASETS.TEST": ""}  # of lists that are empty by default


def load_config(file: str | Path | None = None, overrides: Sequence[Any] = ()) -> CfgNode:
    """The defaults, then `file` (and its `_BASE_` files), then `overrides` (`[KEY, VALUE, KEY, VALUE, …]`).

    Returns a frozen config. Values in `overrides` may be strings, as on a command line, or Python values.

    Raises:
        UserError: unknown key (naming the nearest known one), wrong type, value outside its choices,
            contradicting keys, missing or broken file.
    """
    cfg = _C.clone()
    if file is not None:
        for key, value in _leaves(_read_yaml(Path(file))):
            _set(cfg, key, value, source=str(file))
    if len(overrides) % 2:
        raise UserError(f"overrides: expected KEY VALUE pairs, got {len(overrides)} words: {list(overrides)}")
    for key, value in zip(overrides[0::2], overrides[1::2], strict=True):
        _set(cfg, str(key), value, source="overrides")
    _check(cfg)
    cfg.freeze()
    return cfg


def save_config(cfg: CfgNode, file: str | Path) -> None:
    """Write `cfg` as YAML that `load_config` reads back to an equal config."""
    Path(file).write_text(cfg.dump(), encoding="utf-8")


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"config file {file}: no such file")
    try:
        tree = CfgNode.load_yaml_with_base(str(file))
    except yaml.YAMLError as error:
        raise UserError(f"config file {file}: not valid YAML: {' '.join(str(error).split())}") from error
    except FileNotFoundError as error:
        raise UserError(f"config file {file}: its _BASE_ {error.filename} does not exist") from error
    if not isinstance(tree, dict):
        raise UserError(f"config file {file}: expected a mapping of keys to values, got {type(tree).__name__}")
    return tree


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, key + ".")
        else:
            yield key, value


_KNOWN = dict(_leaves(_C))


def _set(cfg: CfgNode, key: str, value: Any, source: str) -> None:
    if key not in _KNOWN:
        nearest = difflib.get_close_matches(key, _KNOWN, n=1, cutoff=0.0)[0]
        raise UserError(f"{source}: unknown key {key}; the nearest known key is {nearest}")
    default = _KNOWN[key]
    decoded = CfgNode._decode_cfg_value(value) if not isinstance(default, str) else value
    try:
        coerced = _coerce(decoded, [_ELEMENTS[key]] if key in _ELEMENTS else default)
    except TypeError:
        raise UserError(
            f"{source}: {key} takes {_type_name(default)}, got {value!r} ({type(decoded).__name__})"
        ) from None
    *parents, leaf = key.split(".")
    node = cfg
    for parent in parents:
        node = node[parent]
    node[leaf] = coerced


def _coerce(value: Any, default: Any) -> Any:
    """`value` as the type of `default`; TypeError where that would be a guess."""
    if isinstance(default, list):
        if isinstance(value, str):  # a single data set or statistics name is a list of one
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return [_coerce(v, default[0]) for v in value]
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise TypeError
    return value


def _type_name(default: Any) -> str:
    return (
        f"a list such as {default}" if isinstance(default, list) else f"{type(default).__name__} (such as {default!r})"
    )


def _get(cfg: CfgNode, key: str) -> Any:
    node: Any = cfg
    for name in key.split("."):
        node = node[name]
    return node


def _check(cfg: CfgNode) -> None:
    """What must hold of single values, then between keys."""
    for key, choices in _CHOICES.items():
        if _get(cfg, key) not in choices:
            nearest = difflib.get_close_matches(str(_get(cfg, key)), choices, n=1, cutoff=0.0)[0]
            raise UserError(f"{key} takes one of {list(choices)}, got {_get(cfg, key)!r}; nearest: {nearest!r}")
    _check_numbers(cfg)
    for name in cfg.TEST.STATISTICS:
        if name not in STATISTICS:
            raise UserError(f"TEST.STATISTICS takes any of {list(STATISTICS)}, got {name!r}")

    head = cfg.MODEL.RETINANET
    if head.NORM not in BATCH_NORMS:
        for name in ("SGD_STATISTICS", "POPULATION_STATISTICS", "AFFINE"):
            if head[name] != _C.MODEL.RETINANET[name]:
                raise UserError(
                    f"MODEL.RETINANET.{name} {head[name]!r} contradicts MODEL.RETINANET.NORM {head.NORM!r}: "
                    f"it is a choice of {' and '.join(BATCH_NORMS)}; set NORM to one of them or leave {name} out"
                )
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER == "cosine" and solver.STEPS:
        raise UserError(
            f"SOLVER.STEPS {solver.STEPS} contradicts SOLVER.LR_SCHEDULER 'cosine': "
            "leave STEPS empty or set LR_SCHEDULER to 'steps'"
        )
    if sorted(set(solver.STEPS)) != solver.STEPS:
        raise UserError(f"SOLVER.STEPS takes increasing iterations, got {solver.STEPS}")
    if cfg.TEST.EVAL_PERIOD and not cfg.DATASETS.TEST:
        raise UserError(
            f"TEST.EVAL_PERIOD {cfg.TEST.EVAL_PERIOD} contradicts DATASETS.TEST []: name a data set to evaluate on"
        )
    if solver.IMS_PER_BATCH % solver.ACCUMULATE:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} contradicts SOLVER.ACCUMULATE {solver.ACCUMULATE}: "
            "the second must divide the first"
        )
    if solver.AMP.ENABLED and solver.AMP.DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
        raise UserError("SOLVER.AMP.DTYPE 'float16' contradicts MODEL.DEVICE 'cpu': use bfloat16 there")
    for which, smallest in (("TRAIN", max(cfg.INPUT.MIN_SIZE_TRAIN)), ("TEST", cfg.INPUT.MIN_SIZE_TEST)):
        if smallest > cfg.INPUT[f"MAX_SIZE_{which}"]:
            raise UserError(
                f"INPUT.MIN_SIZE_{which} {smallest} contradicts INPUT.MAX_SIZE_{which} "
                f"{cfg.INPUT[f'MAX_SIZE_{which}']}: the shorter side cannot be longer than the longer one"
            )
    if head.IOU_THRESHOLDS[0] > head.IOU_THRESHOLDS[1]:
        raise UserError(f"MODEL.RETINANET.IOU_THRESHOLDS takes two increasing numbers, got {head.IOU_THRESHOLDS}")


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
