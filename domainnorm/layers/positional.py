"""Positional normalization: over the channels of each place."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class PositionalNorm(nn.LayerNorm):
    """Mean and variance over the channels of one place of one sample, γ and β per channel (PN of *BGN*, Table 9).

    Args:
        num_features: C.
        eps: added to the variance.
        affine: None or False: no γ and β.
        device, dtype: of γ and β.

    Shape:
        - Input: `(N, C, *)`
        - Output: as the input
    """

    def __init__(self, num_features: int, *, eps: float = 1e-5, affine: Any = "shared", **factory: Any) -> None:
        super().__init__(num_features, eps, affine not in (None, False), **factory)

    def forward(self, x: Tensor) -> Tensor:
        places = x.movedim(1, -1)
        return F.layer_norm(places, self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)
