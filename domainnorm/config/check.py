"""What must hold between the options of a config."""

import re
from collections.abc import Iterator

from fvcore.common.config import CfgNode

from ..errors import UserError, quote
from .node import get_value, iteration_of
from .option import not_among
from .schema import OPTIONS
from .schema.model import NUM_CLASSES
from .schema.norm import BATCH_NORMS

# Choices of a normalization batch: refused where the model has no use for them, which nobody would notice.
_OF_ONE_ARCHITECTURE = (
    "DATASETS.VALIDATION",
    *("MODEL.MASK_ON", "MODEL.FPN.NORM", "MODEL.RETINANET.NORM", "MODEL.ROI_HEADS.SHUFFLE"),
    *("MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM"),
)
# Iterations or, below 1, shares of MAX_ITER.
_TIMES = (
    *(f"MODEL.NORM.BRN.{name}" for name in ("BN_UNTIL", "R_MAX_AT", "D_MAX_AT")),
    *("SOLVER.FREEZE_NORM_AT", "SOLVER.AVERAGE_WEIGHTS_FROM"),
)
_MIN_EPS = 1e-12  # far less is 0 in float32
_OF_DOMAINS = ("SGD_STATISTICS", "POPULATION_STATISTICS", "AFFINE")
_Contradictions = Iterator[tuple[str, str, str]]  # two keys, and what to do


def check(cfg: CfgNode) -> None:
    """Refuse what cannot hold of single values, then what cannot hold between keys.

    Raises:
        UserError: naming the key, what it got and what it takes.
    """
    for key, option in OPTIONS.items():
        option.check(get_value(cfg, key))
    for key in _TIMES:
        if (when := get_value(cfg, key)) > 1 and when != int(when):
            raise UserError(f"{key} takes an iteration, a whole number, or a share below 1, got {when:g}")
    for section in (_architecture, _heads, _norms, _data_sets, _batches, _solver, _evaluation):
        for *keys, remedy in section(cfg):
            first, second = (f"{key} {_text(get_value(cfg, key))}" for key in keys)
            raise UserError(f"{first} contradicts {second}: {remedy}")


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else quote(value)


def _chosen(cfg: CfgNode, *keys: str) -> list[str]:
    """Those of `keys` that are not at their default."""
    return [key for key in keys if get_value(cfg, key) != OPTIONS[key].default]


def _architecture(cfg: CfgNode) -> _Contradictions:
    name, architecture, key = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.META_ARCHITECTURE, "MODEL.META_ARCHITECTURE"
    levels, sizes = "MODEL.FPN.NUM_LEVELS", "MODEL.ANCHOR_GENERATOR.SIZES"
    if architecture != "Classifier" and len(get_value(cfg, sizes)) != get_value(cfg, levels):
        yield sizes, levels, f"there are {len(get_value(cfg, sizes))} sizes; give one for each level"
    if not re.fullmatch(r"(timm/)?[\w.-]{1,100}", name):
        raise UserError(f"MODEL.BACKBONE.NAME takes a name of torchvision.models, or timm/NAME, got {quote(name)}")
    own = name.startswith(("cifar_", "simplenet"))  # whose depth and width are in their names
    if own and any(len(number) > 4 for number in re.findall(r"\d+", name)):
        raise UserError(f"MODEL.BACKBONE.NAME takes depths and widths up to 9999, got {quote(name)}")
    if architecture == "Classifier" and cfg.MODEL.BACKBONE.FREEZE_AT and _chosen(cfg, "MODEL.BACKBONE.FREEZE_AT"):
        yield "MODEL.BACKBONE.FREEZE_AT", key, "all of its layers are trained; leave FREEZE_AT out"
    names = cfg.MODEL.CLASS_NAMES
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"MODEL.CLASS_NAMES takes names that differ, none of them empty, got {quote(names)}")
    if names and 0 < get_value(cfg, NUM_CLASSES[architecture]) < len(names):
        yield NUM_CLASSES[architecture], "MODEL.CLASS_NAMES", f"there are {len(names)} names; set the first to 0"
    for chosen in _chosen(cfg, *_OF_ONE_ARCHITECTURE):
        if architecture not in (users := OPTIONS[chosen].used_by):
            yield chosen, key, f"it has no effect there; leave it out, or choose {' or '.join(users)}"


def _heads(cfg: CfgNode) -> _Contradictions:
    box, mask = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD
    if mask.NORM and not cfg.MODEL.MASK_ON:
        yield "MODEL.ROI_MASK_HEAD.NORM", "MODEL.MASK_ON", "set MASK_ON to True or leave the norm out"
    if box.NORM and not box.NUM_CONV:
        remedy = "the norm follows convolutions; for the paper's 4conv1fc head set NUM_CONV to 4 and NUM_FC to 1"
        yield "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_BOX_HEAD.NUM_CONV", remedy
    for key in ("MODEL.RETINANET.IOU_THRESHOLDS", "MODEL.RPN.IOU_THRESHOLDS"):
        if get_value(cfg, key) != sorted(get_value(cfg, key)):
            raise UserError(f"{key} takes two increasing numbers, got {quote(get_value(cfg, key))}")


def _norms(cfg: CfgNode) -> _Contradictions:
    model, renorm, domains = cfg.MODEL, cfg.MODEL.NORM.BRN, "MODEL.NORM_DOMAINS"
    if model.RETINANET.NORM not in BATCH_NORMS:
        for key in _chosen(cfg, *(f"MODEL.RETINANET.{name}" for name in _OF_DOMAINS)):
            remedy = f"it is an option of {' and '.join(BATCH_NORMS)}; set NORM to one of them or leave it out"
            yield key, "MODEL.RETINANET.NORM", remedy
    if 0 < model.NORM.EPS < _MIN_EPS:
        raise UserError(f"MODEL.NORM.EPS takes 0 or a number from {_MIN_EPS:g} on, got {model.NORM.EPS:g}")
    if model.NORM_DOMAINS and not cfg.DATASETS.DOMAINS:
        yield domains, "DATASETS.DOMAINS", "name the domain of each of DATASETS.TRAIN"
    if model.NORM_DOMAINS and model.ROI_HEADS.SHUFFLE and (model.ROI_BOX_HEAD.NORM or model.ROI_MASK_HEAD.NORM):
        yield "MODEL.ROI_HEADS.SHUFFLE", domains, "shuffled RoIs leave their data set behind; choose one of them"
    if not model.NORM_DOMAINS:
        keys = [*(f"MODEL.DATASET_NORM.{name}" for name in _OF_DOMAINS), "MODEL.RETINANET.NORM_DOMAINS"]
        for key in _chosen(cfg, *keys):
            yield key, domains, "data sets are no domains; set that to 'dataset', or leave both out"
    if renorm.SYNC and renorm.SAMPLES_PER_GROUP:
        remedy = "micro-batches are of one process; leave one of them out"
        yield "MODEL.NORM.BRN.SAMPLES_PER_GROUP", "MODEL.NORM.BRN.SYNC", remedy
    for name in ("R_MAX_AT", "D_MAX_AT"):
        if 0 < iteration_of(cfg, renorm.BN_UNTIL) >= iteration_of(cfg, renorm[name]):
            remedy = (
                f"of {cfg.SOLVER.MAX_ITER} iterations, the limits grow from the second to the first; lower BN_UNTIL"
            )
            yield f"MODEL.NORM.BRN.{name}", "MODEL.NORM.BRN.BN_UNTIL", remedy


def _data_sets(cfg: CfgNode) -> _Contradictions:
    sets = cfg.DATASETS
    for key, other in (
        *(("DATASETS.DOMAINS", "DATASETS.TRAIN"), ("DATASETS.TEST_DOMAINS", "DATASETS.TEST")),
        ("DATALOADER.RATIOS", "DATASETS.TRAIN"),
    ):
        if get_value(cfg, key) and len(get_value(cfg, key)) != len(get_value(cfg, other)):
            yield key, other, f"it takes one for each of these {len(get_value(cfg, other))}, or []"
    for domain in sets.DOMAINS:
        if not domain.strip() or "\n" in domain:
            raise UserError(f"DATASETS.DOMAINS takes names of one line, got {quote(domain)}")
    if sets.TEST_DOMAINS and not sets.DOMAINS:
        yield "DATASETS.TEST_DOMAINS", "DATASETS.DOMAINS", "name the domains of DATASETS.TRAIN, or leave it out"
    for domain in filter(None, sets.TEST_DOMAINS):
        if domain not in sets.DOMAINS:
            raise not_among("DATASETS.TEST_DOMAINS takes any of DATASETS.DOMAINS and '',", domain, sets.DOMAINS)
    renamed = [[name.strip() for name in entry.split("=")] for entry in sets.RENAME]
    for entry, names in zip(sets.RENAME, renamed, strict=True):
        if len(names) != 2 or not all(names):
            raise UserError(f"DATASETS.RENAME takes entries such as 'old=new', got {quote(entry)}")
        if sum(other[0] == names[0] for other in renamed) > 1:
            raise UserError(f"DATASETS.RENAME has several new names for {quote(names[0])}: {quote(sets.RENAME)}")
    jitter = cfg.INPUT.SCALE_JITTER
    if jitter and (len(jitter) != 2 or jitter[0] > jitter[1]):
        raise UserError(f"INPUT.SCALE_JITTER takes two increasing numbers, or [], got {quote(jitter)}")
    for which, smallest in (("TRAIN", max(cfg.INPUT.MIN_SIZE_TRAIN)), ("TEST", cfg.INPUT.MIN_SIZE_TEST)):
        if smallest > cfg.INPUT[f"MAX_SIZE_{which}"]:
            remedy = "the shorter side cannot be longer than the longer one"
            yield f"INPUT.MIN_SIZE_{which}", f"INPUT.MAX_SIZE_{which}", remedy


def _batches(cfg: CfgNode) -> _Contradictions:
    batches, classes = cfg.DATALOADER.BATCHES, cfg.DATALOADER.CLASSES_PER_BATCH
    if batches != "iid" and cfg.MODEL.META_ARCHITECTURE != "Classifier":
        remedy = "an image there has no one class; leave BATCHES out, or choose Classifier"
        yield "DATALOADER.BATCHES", "MODEL.META_ARCHITECTURE", remedy
    if cfg.DATALOADER.COMPOSITION != "mixed" and not cfg.DATASETS.DOMAINS:
        remedy = "name the domains of DATASETS.TRAIN, or set it to mixed"
        yield "DATALOADER.COMPOSITION", "DATASETS.DOMAINS", remedy
    for key in _chosen(cfg, "DATALOADER.RATIOS", "DATALOADER.COMPOSITION") if batches != "iid" else ():
        yield key, "DATALOADER.BATCHES", "the second takes all data sets as one; leave one of them out"
    if batches.startswith("few_classes") != bool(classes):
        remedy = "leave it out, or set BATCHES to few_classes" if classes else "say how many classes a batch holds"
        yield "DATALOADER.CLASSES_PER_BATCH", "DATALOADER.BATCHES", remedy


def _solver(cfg: CfgNode) -> _Contradictions:
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "SGD" and solver.NESTEROV and not solver.MOMENTUM:
        yield "SOLVER.NESTEROV", "SOLVER.MOMENTUM", "there is no momentum to be Nesterov's; set the first to False"
    if solver.WEIGHT_DECAY_NORM_TARGET and not solver.WEIGHT_DECAY_NORM:
        remedy = "nothing decays to it; set that too, or leave it out"
        yield "SOLVER.WEIGHT_DECAY_NORM_TARGET", "SOLVER.WEIGHT_DECAY_NORM", remedy
    if solver.LR_SCHEDULER != "steps" and solver.STEPS:
        yield "SOLVER.STEPS", "SOLVER.LR_SCHEDULER", "leave STEPS empty or set LR_SCHEDULER to 'steps'"
    if sorted(set(solver.STEPS)) != solver.STEPS:
        raise UserError(f"SOLVER.STEPS takes increasing iterations, got {quote(solver.STEPS)}")
    if solver.IMS_PER_BATCH % solver.ACCUMULATE:
        yield "SOLVER.IMS_PER_BATCH", "SOLVER.ACCUMULATE", "the second must divide the first"
    for name in ("LAYERS", "RECOMPUTE", "AFFINE", "WARMUP_ITERS") if not solver.FREEZE_NORM_AT else ():
        for key in _chosen(cfg, f"SOLVER.FREEZE_NORM_{name}"):
            yield key, "SOLVER.FREEZE_NORM_AT", "statistics are never frozen; say when, or leave it out"
    if solver.AMP.ENABLED and solver.AMP.DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
        yield "SOLVER.AMP.DTYPE", "MODEL.DEVICE", "use bfloat16 there"


def _evaluation(cfg: CfgNode) -> _Contradictions:
    weights, validation = cfg.TEST.EXAMPLE_WEIGHTS, cfg.TEST.EXAMPLE_WEIGHT_DATASET
    if cfg.TEST.EVAL_PERIOD and not cfg.DATASETS.TEST:
        yield "TEST.EVAL_PERIOD", "DATASETS.TEST", "name a data set to evaluate on"
    if weights and set(cfg.TEST.STATISTICS) == {"minibatch"}:
        remedy = "the weights are against population statistics; add population or recomputed"
        yield "TEST.EXAMPLE_WEIGHTS", "TEST.STATISTICS", remedy
    if cfg.TEST.TRAINING_IMAGES and cfg.MODEL.NORM_DOMAINS:
        remedy = "an image is scored without its domain; leave TRAINING_IMAGES out"
        yield "TEST.TRAINING_IMAGES", "MODEL.NORM_DOMAINS", remedy
    if (len(weights) > 1) != bool(validation):
        remedy = "give several weights to choose from" if validation else "name a data set to choose on"
        yield "TEST.EXAMPLE_WEIGHT_DATASET", "TEST.EXAMPLE_WEIGHTS", remedy
    if validation and validation in cfg.DATASETS.TEST:
        remedy = "what is chosen on a data set cannot be tested on it; name another one"
        raise UserError(f"TEST.EXAMPLE_WEIGHT_DATASET {quote(validation)} is one of DATASETS.TEST: {remedy}")
