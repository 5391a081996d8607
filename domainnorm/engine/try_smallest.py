"""The smallest images of the training sets, tried before the first step: their coarsest level may be one number."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn

from ..data import domain_names
from ..data.boxes import resized
from ..data.sampler import images_per_forward
from ..distributed import get_device, world_size
from ..errors import UserError
from ..layers import DomainBatchNorm
from ..modeling.mask_rcnn import GeneralizedRCNN
from ..modeling.retinanet import RetinaNet
from ..statistics.preserve import preserve_state
from ..surgery.domains import use_domains_of

ONE_VALUE = "more than 1 value per channel"  # in the error of a layer that has one
REMEDY = "raise INPUT.MIN_SIZE_TRAIN or SOLVER.IMS_PER_BATCH, or choose GN"

logger = logging.getLogger(__name__)
_SIDE = 128  # pixels: of larger images the coarsest level, of stride 128, has more than one place


@torch.no_grad()
def try_smallest(cfg: CfgNode, model: nn.Module, datasets: Sequence[Any]) -> None:
    """Refuse a detector whose norms have one value in a channel of the smallest images. Every rank calls it.

    Where that happens only in a batch that has one image of a domain, it is a warning.

    Args:
        datasets: those of training; the sizes of images of others than this library's are not known.

    Raises:
        UserError: naming the keys.
    """
    norms = [module for module in model.modules() if isinstance(module, DomainBatchNorm) and not module.frozen]
    images = images_per_forward(cfg, world_size())
    mixed = cfg.DATASETS.DOMAINS and cfg.DATALOADER.COMPOSITION == "mixed"  # a domain may have one image of a batch
    always = images == 1 or any(norm.sample_groups is not None for norm in norms)
    jitter = cfg.INPUT.SCALE_JITTER
    smallest = min(cfg.INPUT.MIN_SIZE_TRAIN) if not jitter else jitter[0] * cfg.INPUT.MAX_SIZE_TRAIN
    possible = always or mixed
    if not isinstance(model, (RetinaNet, GeneralizedRCNN)) or not norms or not possible or smallest > _SIDE:
        return
    sizes = (size for dataset in datasets for size in getattr(dataset, "sizes", ()))
    size = min(sizes, key=lambda size: max(_resized(cfg, size)), default=(_SIDE + 1,) * 2)
    height, width = _resized(cfg, size)
    if max(height, width) > _SIDE:
        return
    device = get_device(cfg.MODEL.DEVICE)
    key = f"INPUT.SCALE_JITTER {list(jitter)}" if jitter else f"INPUT.MIN_SIZE_TRAIN {smallest}"
    part, keys = "MODEL.BACKBONE.NORM or MODEL.FPN.NORM", f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}"
    try:
        with preserve_state(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            if cfg.DATASETS.DOMAINS:
                last = len(domain_names(cfg)) - 1
                use_domains_of(model, [{"domain": torch.tensor(0 if k == 0 else last)} for k in range(images)])
            shape = [side + -side % 32 for side in (height, width)]
            features = model.backbone(torch.zeros(images, 3, *shape, device=device))
            part = f"MODEL.RETINANET.NORM {cfg.MODEL.RETINANET.NORM!r}"
            if isinstance(model, RetinaNet):
                model.head(list(features.values()))
    except ValueError as error:
        if ONE_VALUE not in str(error):
            raise
        message = (
            f"{key}: an image of {size[0]} x {size[1]} pixels may become {height} x {width}, whose coarsest "
            f"features are 1 x 1: {part} has one value per channel there, with {keys} over "
            f"{world_size()} processes and SOLVER.ACCUMULATE {cfg.SOLVER.ACCUMULATE}; "
            f"{REMEDY.replace('INPUT.MIN_SIZE_TRAIN', key.split()[0])}"
        )
        if always:
            raise UserError(message) from error
        logger.warning("a batch with one image of a domain will end the training: %s", message)


def _resized(cfg: CfgNode, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the smallest that training may make of an image."""
    options = cfg.INPUT
    if options.RANDOM_IOU_CROP:
        size = (min(size),) * 2  # the crop may be square
    if options.SCALE_JITTER:
        scale = options.SCALE_JITTER[0] * options.MAX_SIZE_TRAIN / max(size)
        height, width = (max(min(int(side * scale), options.MAX_SIZE_TRAIN), 1) for side in size)
        return height, width
    height, width = resized(np.array([size]), min(options.MIN_SIZE_TRAIN), options.MAX_SIZE_TRAIN)[0].tolist()
    return height, width
