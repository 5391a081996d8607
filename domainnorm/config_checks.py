"""What must hold between the options of a config."""

import difflib

from fvcore.common.config import CfgNode

from .config_choices import BATCH_NORMS, ONLY_OF, check_values, get_value
from .config_values import iteration_of
from .errors import UserError


def check(cfg: CfgNode, defaults: CfgNode) -> None:
    """Refuse what cannot hold of single values, then what cannot hold between keys.

    Raises:
        UserError: naming the key, what it got and what it takes.
    """
    check_values(cfg)
    _check_model(cfg.MODEL, defaults.MODEL)
    _check_data_sets(cfg.DATASETS)
    _check_batches(cfg)
    _check_solver(cfg)
    if cfg.MODEL.NORM_DOMAINS and not cfg.DATASETS.DOMAINS:
        raise UserError(
            f"MODEL.NORM_DOMAINS {cfg.MODEL.NORM_DOMAINS!r} contradicts DATASETS.DOMAINS []: name the domain of "
            "each of DATASETS.TRAIN"
        )
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
    if not model.NORM_DOMAINS:
        for name in ("DATASET_NORM.SGD_STATISTICS", "DATASET_NORM.POPULATION_STATISTICS", "DATASET_NORM.AFFINE"):
            if get_value(model, name) != get_value(defaults, name):
                raise UserError(
                    f"MODEL.{name} {get_value(model, name)!r} contradicts MODEL.NORM_DOMAINS '': no norm has data "
                    "sets for domains; set NORM_DOMAINS to 'dataset', or leave it out"
                )
        if head.NORM_DOMAINS != "level":
            raise UserError(
                f"MODEL.RETINANET.NORM_DOMAINS {head.NORM_DOMAINS!r} contradicts MODEL.NORM_DOMAINS '': set that to "
                "'dataset', or leave both out"
            )
    elif model.ROI_HEADS.SHUFFLE and (model.ROI_BOX_HEAD.NORM or model.ROI_MASK_HEAD.NORM):
        raise UserError(
            "MODEL.ROI_HEADS.SHUFFLE True contradicts MODEL.NORM_DOMAINS 'dataset': shuffled RoIs leave their data set "
            "behind; choose one of them"
        )
    # What chooses a batch must not be without effect.
    for key, architectures in ONLY_OF.items():
        if model.META_ARCHITECTURE not in architectures and get_value(model, key) != get_value(defaults, key):
            raise UserError(
                f"MODEL.{key} {get_value(model, key)!r} contradicts MODEL.META_ARCHITECTURE "
                f"{model.META_ARCHITECTURE!r}, which has no use for it: leave {key} out, or choose "
                f"{' or '.join(architectures)}"
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


def _check_data_sets(sets: CfgNode) -> None:
    for key, of in (("DOMAINS", "TRAIN"), ("TEST_DOMAINS", "TEST")):
        if sets[key] and len(sets[key]) != len(sets[of]):
            raise UserError(
                f"DATASETS.{key} {sets[key]} contradicts DATASETS.{of} {sets[of]}: it takes one for each of these "
                f"{len(sets[of])}, or []"
            )
    for domain in sets.DOMAINS:
        if not domain.strip() or "\n" in domain:
            raise UserError(f"DATASETS.DOMAINS takes names of one line, got {domain!r}")
    for domain in sets.TEST_DOMAINS:
        if not sets.DOMAINS:
            raise UserError(
                f"DATASETS.TEST_DOMAINS {sets.TEST_DOMAINS} contradicts DATASETS.DOMAINS []: name the domains of "
                "DATASETS.TRAIN, or leave it out"
            )
        if domain and domain not in sets.DOMAINS:
            nearest = difflib.get_close_matches(domain, sets.DOMAINS, n=1, cutoff=0.0)[0]
            raise UserError(
                f"DATASETS.TEST_DOMAINS takes any of DATASETS.DOMAINS {sets.DOMAINS}, or '' for unknown, got "
                f"{domain!r}; nearest: {nearest!r}"
            )
    renamed = [[name.strip() for name in entry.split("=")] for entry in sets.RENAME]
    for entry, names in zip(sets.RENAME, renamed, strict=True):
        if len(names) != 2 or not all(names):
            raise UserError(f"DATASETS.RENAME takes entries such as 'old=new', got {entry!r}")
        if sum(other[0] == names[0] for other in renamed) > 1:
            raise UserError(f"DATASETS.RENAME has several new names for {names[0]!r}: {sets.RENAME}")


def _check_batches(cfg: CfgNode) -> None:
    batches, classes = cfg.DATALOADER.BATCHES, cfg.DATALOADER.CLASSES_PER_BATCH
    if batches != "iid" and cfg.MODEL.META_ARCHITECTURE != "Classifier":
        raise UserError(
            f"DATALOADER.BATCHES {batches!r} contradicts MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r}: an "
            "image there has no one class; leave BATCHES out, or choose Classifier"
        )
    ratios, composition = cfg.DATALOADER.RATIOS, cfg.DATALOADER.COMPOSITION
    if ratios and len(ratios) != len(cfg.DATASETS.TRAIN):
        raise UserError(
            f"DATALOADER.RATIOS {ratios} contradicts DATASETS.TRAIN {cfg.DATASETS.TRAIN}: it takes one for each of "
            f"these {len(cfg.DATASETS.TRAIN)}, or []"
        )
    if composition != "mixed" and not cfg.DATASETS.DOMAINS:
        raise UserError(
            f"DATALOADER.COMPOSITION {composition!r} contradicts DATASETS.DOMAINS []: name the domains of "
            "DATASETS.TRAIN, or set it to mixed"
        )
    for key, value in (("RATIOS", ratios), ("COMPOSITION", composition)):
        if batches != "iid" and value not in ([], "mixed"):
            raise UserError(
                f"DATALOADER.{key} {value!r} contradicts DATALOADER.BATCHES {batches!r}, which takes all data sets as "
                "one: leave one of them out"
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
