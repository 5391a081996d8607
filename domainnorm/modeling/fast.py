"""A model that predicts in less time, with other rounding."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import DomainBatchNorm
from ..surgery.fuse import fuse
from .channels_last import ChannelsLast

_PLAIN = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)  # autocast computes them in half precision


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16: without, a processor converts to float32 and back."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class FastModel(nn.Module):
    """A copy of a model in eval mode whose norms are folded into convolutions where population statistics normalize
    (`dn.fuse`), with convolutions in channels_last and, on demand, in bfloat16.

    Args:
        model: a detector or classifier of `build_model`; it stays as it is.
        score: detections with less are not looked for.
        bfloat16: whether convolutions and linear layers compute in it.
    """

    def __init__(self, model: nn.Module, score: float = 0.0, *, bfloat16: bool = False) -> None:
        super().__init__()
        norms = [module for module in model.modules() if isinstance(module, DomainBatchNorm)]
        folds = not any(norm.uses_minibatch or norm.example_weight for norm in norms)
        self.model: Any = fuse(model) if folds else copy.deepcopy(model)
        self.model.requires_grad_(False).to(memory_format=torch.channels_last)
        if isinstance(self.model, ChannelsLast):
            self.model.always_last = True
            transform: Any = self.model.transform
            transform.always_last = True
            detector: Any = getattr(self.model, "roi_heads", self.model)
            detector.score_thresh = max(detector.score_thresh, score)
        self.in_bfloat16 = bfloat16
        for module in self.model.modules() if bfloat16 else ():
            if type(module) in _PLAIN:  # once, and not again for each image
                module.bfloat16()

    def forward(self, images: list[Tensor]) -> Any:
        """What the model returns, of images `(3, H, W)` in [0, 1]."""
        batch: Any = images
        if not isinstance(self.model, ChannelsLast):
            batch = torch.stack(images).contiguous(memory_format=torch.channels_last)
        with torch.autocast(images[0].device.type, dtype=torch.bfloat16, enabled=self.in_bfloat16):
            return self.model(batch)
