"""GroupNorm as torch has it, also of groups of one number, and with moments in float32."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that also accepts groups of one number, whose output is β; torch's raises for a single sample.

    With one channel per group, a pyramid level of one pixel makes such groups.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.num_groups == self.num_channels and x.shape[2:].numel() == 1:
            x = x - x  # what rounding leaves of a number less itself would be divided by sqrt(eps)
        return _in_float32(torch.group_norm, x, self.num_groups, self.weight, self.bias, self.eps)


class PositionalNorm(nn.LayerNorm):
    """Normalization over the channels of one position of one sample; γ and β are per channel (PN of *BGN*, Table 9).

    Args:
        num_features: number of channels, C.
        eps: added to the variance.
        affine: None or False: no γ and β.
        device, dtype: of γ and β.

    Shape:
        - Input: `(N, C, *)`
        - Output: same as the input
    """

    def __init__(self, num_features: int, *, eps: float = 1e-5, affine: Any = "shared", **factory: Any) -> None:
        super().__init__(num_features, eps, affine not in (None, False), **factory)

    def forward(self, x: Tensor) -> Tensor:
        places = x.movedim(1, -1)
        return _in_float32(F.layer_norm, places, self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)


def _in_float32(
    function: Callable[..., Tensor],
    x: Tensor,
    groups: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """A normalization by torch; of half precision on a CPU, where torch's moments are no better, in float32."""
    if not x.is_cpu or x.dtype not in (torch.float16, torch.bfloat16):
        return function(x, groups, weight, bias, eps)
    weight, bias = (v if v is None else v.float() for v in (weight, bias))
    return function(x.float().contiguous(), groups, weight, bias, eps).to(x.dtype)
