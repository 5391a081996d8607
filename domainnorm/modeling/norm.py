"""The options of a config's norms."""

from typing import Any

from fvcore.common.config import CfgNode

from ..config import iteration_of
from ..config.schema.norm import BATCH_NORMS
from ..data import domain_names


def norm_options(cfg: CfgNode, name: str) -> dict[str, Any]:
    """What `MODEL.NORM` and `MODEL.NORM_DOMAINS` say of the norm `name`, as options of `get_norm`."""
    options = own_options(cfg, name)
    if cfg.MODEL.NORM_DOMAINS and name not in ("", "GN"):
        choices = cfg.MODEL.DATASET_NORM
        options |= {
            "num_domains": len(domain_names(cfg)),
            "sgd_statistics": choices.SGD_STATISTICS,
            "population_statistics": choices.POPULATION_STATISTICS,
            "affine": choices.AFFINE or None,
        }
    return options


def own_options(cfg: CfgNode, name: str) -> dict[str, Any]:
    """What `MODEL.NORM` says of the norm `name`; and whether it keeps what `TEST.EXAMPLE_WEIGHTS` mix with."""
    options = _of_norm(cfg, name)
    return options | {"track_total_var": True} if cfg.TEST.EXAMPLE_WEIGHTS and name in BATCH_NORMS else options


def _of_norm(cfg: CfgNode, name: str) -> dict[str, Any]:
    node = cfg.MODEL.NORM
    if name == "GN":
        return {"num_groups": node.GN.NUM_GROUPS}
    if name == "GhostBN":
        return {"samples_per_group": node.GHOSTBN.SAMPLES_PER_GROUP}
    if name == "SeqNorm":
        return {
            "num_channel_groups": node.SEQNORM.NUM_CHANNEL_GROUPS,
            "num_sample_groups": node.SEQNORM.NUM_SAMPLE_GROUPS,
        }
    if name == "BGN":
        return {"num_groups": node.BGN.NUM_GROUPS, "split_space": node.BGN.SPLIT_SPACE, "sync": node.BGN.SYNC}
    if name == "GBGN":
        return {"num_channel_groups": node.GBGN.NUM_CHANNEL_GROUPS, "samples_per_group": node.GBGN.SAMPLES_PER_GROUP}
    if name == "BRN":
        return {
            "r_max": _limit(cfg, 1.0, node.BRN.R_MAX, node.BRN.R_MAX_AT),
            "d_max": _limit(cfg, 0.0, node.BRN.D_MAX, node.BRN.D_MAX_AT),
            "momentum": node.BRN.MOMENTUM,
            "samples_per_group": node.BRN.SAMPLES_PER_GROUP or None,
            "sync": node.BRN.SYNC,
        }
    return {}


def roi_norm_options(cfg: CfgNode, name: str) -> dict[str, Any]:
    """The options of a norm in a head over RoIs, whose number varies: fewer than a group has are one group."""
    options = norm_options(cfg, name)
    if name in ("GhostBN", "SeqNorm", "GBGN") or options.get("samples_per_group"):
        options["allow_smaller_batch"] = True
    return options


def _limit(cfg: CfgNode, first: float, last: float, at: float) -> float | list[tuple[int, float]]:
    """From BatchNorm's limit, `first`, in a straight line to `last`; in training forwards."""
    begin, end = (iteration_of(cfg, when) * cfg.SOLVER.ACCUMULATE for when in (cfg.MODEL.NORM.BRN.BN_UNTIL, at))
    return [(begin, first), (end, last)] if begin < end else last
