"""The domain in which a model predicts (`TEST.DOMAIN`)."""

import copy
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from ..surgery.nearest import nearest_domain
from ..surgery.resize_domains import merge_domains, use_domain


def in_domain(cfg: CfgNode, model: nn.Module, domain: str) -> nn.Module:
    """`model` as it predicts for images of `domain`, a name, or "" where it is not known."""
    if not cfg.MODEL.NORM_DOMAINS:
        return model
    if cfg.TEST.DOMAIN == "average":
        return merge_domains(copy.deepcopy(model))
    if cfg.TEST.DOMAIN == "nearest":
        return Nearest(model)
    use_domain(model, domain)
    return model


class Nearest(nn.Module):
    """Each image in the domain whose statistics are most like its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: list[Tensor]) -> Any:
        found = []
        for image in images:
            with use_domain(self.model, nearest_domain(self.model, [image])):
                found.append(self.model([image]))
        return torch.cat(found) if isinstance(found[0], Tensor) else [one for of_image in found for one in of_image]
