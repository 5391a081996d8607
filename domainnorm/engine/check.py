"""What only the built model shows to be wrong with a config, before training begins."""

import copy
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from ..data import by_name, test_loader
from ..data.sampler import images_per_forward
from ..distributed import rank, world_size
from ..errors import UserError
from ..evaluation.compare import check_statistics
from ..evaluation.recompute import batch_size
from ..evaluation.test_set import TestSet
from ..layers import BatchGroupNorm, DomainBatchNorm
from ..statistics.virtual_batch import virtual_batch
from ..surgery.convert import convert_groupnorm
from .freeze import prefixes


def check_model(cfg: CfgNode, model: nn.Module) -> None:
    """Refuse what training or the evaluation after it would fail at.

    Raises:
        UserError: naming the key.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, DomainBatchNorm)}
    for beginning in prefixes(cfg) if cfg.SOLVER.FREEZE_NORM_AT else ():
        if not any(name.startswith(beginning) for name in norms):
            parts = ", ".join(name for name, _ in model.named_children())
            if not beginning:
                raise UserError(f"SOLVER.FREEZE_NORM_AT {cfg.SOLVER.FREEZE_NORM_AT:g}: the model has no BatchNorm")
            raise UserError(
                f"SOLVER.FREEZE_NORM_LAYERS: no BatchNorm has a name that begins with {beginning!r}; "
                f"the model has {parts}"
            )
    if cfg.DATASETS.TEST:
        check_statistics(model, cfg.TEST.STATISTICS)
    if world_size() > 1:
        _check_torchs_norms(model)
    if cfg.SOLVER.VIRTUAL_BATCH:
        try:
            with virtual_batch(model, None):
                pass
        except ValueError as error:
            raise UserError(f"SOLVER.VIRTUAL_BATCH {cfg.SOLVER.VIRTUAL_BATCH}: {error}") from error
    _check_pieces_of_rois(cfg, norms)
    images = images_per_forward(cfg, world_size())
    for name, layer in norms.items():
        groups = layer.sample_groups
        if groups is not None and not groups.allow_smaller_batch and not layer.frozen and groups.min_samples > images:
            raise UserError(
                f"MODEL.NORM: {name} ({type(layer).__name__}, {layer.grouping()}) normalizes groups of {images} "
                f"images, those of one forward pass (SOLVER.IMS_PER_BATCH over processes and SOLVER.ACCUMULATE): "
                f"expected {groups.min_samples} or more; lower {groups.option.upper()} there, or raise IMS_PER_BATCH"
            )
    if cfg.TEST.EXAMPLE_WEIGHTS:
        try:
            convert_groupnorm(copy.deepcopy(model))
        except TypeError as error:
            raise UserError(f"TEST.EXAMPLE_WEIGHTS {cfg.TEST.EXAMPLE_WEIGHTS}: {error}") from error


def _check_torchs_norms(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        own = isinstance(layer, (DomainBatchNorm, nn.SyncBatchNorm))
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats and not own:
            raise UserError(
                f"{name} is torch's {type(layer).__name__}, whose running statistics would differ between the "
                f"{world_size()} processes: dn.convert_batchnorm(model, 'DomainBatchNorm') makes it a layer whose "
                "statistics are merged, nn.SyncBatchNorm.convert_sync_batchnorm(model) a synchronized one"
            )


def _check_pieces_of_rois(cfg: CfgNode, norms: dict[str, DomainBatchNorm]) -> None:
    for name, layer in norms.items():
        if isinstance(layer, BatchGroupNorm) and name.startswith("roi_heads."):
            side = (cfg.MODEL.ROI_BOX_HEAD if ".box_" in name else cfg.MODEL.ROI_MASK_HEAD).POOLER_RESOLUTION
            if layer.num_features % layer.num_groups and layer.num_features * side**2 % layer.num_groups:
                raise UserError(
                    f"MODEL.NORM.BGN.NUM_GROUPS {layer.num_groups} does not divide the {layer.num_features} x {side} x "
                    f"{side} features of {name}: use a divisor, or set MODEL.NORM.BGN.SPLIT_SPACE False"
                )


def check_test_sets(cfg: CfgNode) -> list[Any]:
    """Open every data set of the evaluation, as it will: what is wrong shows before the first step.

    Returns:
        Those of `DATASETS.TEST`.

    Raises:
        UserError: naming the key, or the data set.
    """
    batch_size(cfg)
    by_name(cfg.DATASETS.TEST)  # two data sets of one name
    tests = [TestSet(cfg, name).loader.dataset for name in cfg.DATASETS.TEST]
    if cfg.TEST.EXAMPLE_WEIGHT_DATASET:
        TestSet(cfg, cfg.TEST.EXAMPLE_WEIGHT_DATASET)
    if cfg.TEST.RECOMPUTE.DATASET:
        test_loader(cfg, cfg.TEST.RECOMPUTE.DATASET, rank=rank(), world_size=world_size())
    return tests
