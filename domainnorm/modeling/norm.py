"""The options of a config's norms."""

from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from ..config import iteration_of
from ..config.schema.norm import BATCH_NORMS, SAMPLE_NORMS
from ..data import domain_names
from ..distributed.collectives import sub_group, world_size
from ..errors import UserError
from ..layers import is_norm
from ..surgery.convert import convert_batchnorm
from ..surgery.replace import replace_layers


def norm_options(cfg: CfgNode, name: str) -> dict[str, Any]:
    """What `MODEL.NORM` and `MODEL.NORM_DOMAINS` say of the norm `name`, as options of `get_norm`."""
    options = own_options(cfg, name)
    if cfg.MODEL.NORM_DOMAINS and name not in ("", *SAMPLE_NORMS):
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
    node, options = cfg.MODEL.NORM, _of_norm(cfg, name)
    if node.EPS and name:
        options["eps"] = node.EPS
    if node.MOMENTUM and name in BATCH_NORMS:
        options["momentum"] = node.MOMENTUM
    if node.SYNC_GROUP_SIZE and (name == "SyncBN" or options.get("sync")):
        if world_size() > 1 and world_size() % node.SYNC_GROUP_SIZE:
            raise UserError(
                f"MODEL.NORM.SYNC_GROUP_SIZE {node.SYNC_GROUP_SIZE} does not divide the {world_size()} processes"
            )
        options["sync"] = sub_group(node.SYNC_GROUP_SIZE) or True  # None: all ranks
    if cfg.TEST.EXAMPLE_WEIGHTS and name in BATCH_NORMS:
        options["track_total_var"] = True
    return options


def with_norm(model: nn.Module, norm: str, options: dict[str, Any], name: str) -> nn.Module:
    """The backbone `name` with `norm` in place of its BatchNorms; "": with none."""
    if not norm:
        batch_norm = nn.modules.batchnorm._BatchNorm
        return replace_layers(model, lambda _, m: nn.Identity() if isinstance(m, batch_norm) else m)
    try:
        return convert_batchnorm(model, norm, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"MODEL.BACKBONE.NORM {norm!r} of {name}: {error}") from error


def fix_weights(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """With `MODEL.NORM.FIXED_WEIGHT`, no γ of a norm is trained; returns the model."""
    if cfg.MODEL.NORM.FIXED_WEIGHT:
        for module in model.modules():
            if is_norm(module) and isinstance(weight := getattr(module, "weight", None), nn.Parameter):
                weight.requires_grad_(False)
    return model


def _of_norm(cfg: CfgNode, name: str) -> dict[str, Any]:
    node = cfg.MODEL.NORM
    if name == "GN":
        return {"num_groups": node.GN.NUM_GROUPS}
    if name == "GhostBN":
        number = node.GHOSTBN.NUM_SAMPLE_GROUPS
        return {"num_sample_groups": number} if number else {"samples_per_group": node.GHOSTBN.SAMPLES_PER_GROUP}
    if name == "SeqNorm":
        return {
            "num_channel_groups": node.SEQNORM.NUM_CHANNEL_GROUPS,
            "num_sample_groups": node.SEQNORM.NUM_SAMPLE_GROUPS,
            "group_norm_first": node.SEQNORM.GROUP_NORM_FIRST,
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
