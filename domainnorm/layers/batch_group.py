"""All samples and one of G pieces of the flattened features normalized together."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .domain_batch_norm import DomainBatchNorm
from .inputs import LayerInput


class BatchGroupNorm(DomainBatchNorm):
    """Normalization over all samples and one of G equal, consecutive pieces of the flattened features (BGN, Eqs. 8, 9).

    Each sample's `(C, H, W)` is flattened to D = C · H · W numbers. With G = C this is BatchNorm. γ and β are per
    channel, the population statistics per piece, `(G,)`. With G > C, pieces are parts of channels and the layer works
    at one feature size: the first that it sees in training, which its state dict keeps as `feature_size`. With G ≤ C it
    works at any size for which G divides D; if G does not divide C, the tensors of one list must have equal sizes.

    Args:
        num_features: number of channels, C.
        num_groups: number of pieces, G; divides D.
        **options: of `DomainBatchNorm`, including `sync`.

    Shape:
        - Input: `(N, C, *)`, or a list of such tensors
        - Output: same as the input

    Raises:
        ValueError: G < 1; from the call: G does not divide D; with G > C, the feature size has changed; or G does not
            divide C and the tensors of a list have different sizes.

    Example::

        >>> norm = dn.BatchGroupNorm(16, num_groups=4)  # four channels together
        >>> norm(torch.randn(4, 16, 8, 8)).shape, norm.running_mean.shape
        (torch.Size([4, 16, 8, 8]), torch.Size([4]))
    """

    is_channel_affine = False
    merged_channels = True

    def __init__(self, num_features: int, *, num_groups: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        if num_groups < 1:
            raise ValueError(f"num_groups takes a positive number, got {num_groups}")
        self.num_groups = num_groups
        self.channels_per_group = num_features // num_groups
        self.feature_size: tuple[int, ...] | None = None  # where pieces are parts of channels
        self._register_statistics(num_groups, {"device": options.get("device"), "dtype": options.get("dtype")})

    def _reset_statistics(self) -> None:
        super()._reset_statistics()
        self.feature_size = None

    def _pieces(self, tensors: list[Tensor]) -> list[Tensor]:
        """`tensors` as rows `(N, R, *)` that lie within one channel and one piece, as long as can be."""
        if self.num_features % self.num_groups == 0:
            return tensors
        expected = self.feature_size  # None where a piece has a channel or more: of any size it is the same part
        for x in tensors:
            expected = self._check_feature_size(x, expected)
        spatial = 0 if expected is None else math.prod(expected)
        length = math.gcd(self.num_features * spatial // self.num_groups, spatial)
        rows = self.num_features * (spatial // length if length else self.num_groups)
        return [x.reshape(x.shape[0], rows, length if x.numel() else 0) for x in tensors]

    def _check_feature_size(self, x: Tensor, expected: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """ValueError if `x` cannot be split, or has elements and not the expected size, which is returned."""
        size = math.prod(x.shape[1:])
        if size % self.num_groups:
            divisors = [d for d in range(1, size + 1) if size % d == 0]
            nearest = sorted(divisors, key=lambda d: abs(d - self.num_groups))[:2]
            raise ValueError(
                f"num_groups takes a divisor of D = {' x '.join(map(str, x.shape[1:]))} = {size}, got G = "
                f"{self.num_groups}; the nearest are {' and '.join(map(str, sorted(nearest)))}"
            )
        if not x.numel():
            return expected
        if expected not in (None, tuple(x.shape[2:])):
            which = "the layer works at" if self.num_groups > self.num_features else "the tensors of a list have"
            raise ValueError(
                f"num_groups={self.num_groups} splits {self.num_features} channels in space, so {which} one feature "
                f"size: expected {expected}, got {tuple(x.shape[2:])}; use a divisor of {self.num_features}"
            )
        return tuple(x.shape[2:])

    def _tensors(self, inputs: LayerInput) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        pieces = self._pieces(inputs.tensors)
        times = pieces[0].shape[1] // self.num_features
        weight, bias = (
            v if v is None or times == 1 else v.repeat_interleave(times, -1) for v in (self.weight, self.bias)
        )
        return pieces, weight, bias

    def _channels_per_group(self, tensors: Sequence[Tensor]) -> int:
        # where pieces are not whole channels, the rows of a channel are several pieces, or parts of them
        return tensors[0].shape[1] // self.num_groups

    def _restore(self, outputs: list[Tensor], inputs: LayerInput) -> list[Tensor]:
        if self.training and self.num_groups > self.num_features:
            for x in inputs.tensors:
                if x.numel():
                    self.feature_size = tuple(x.shape[2:])
        return [_like(y, x) for y, x in zip(outputs, inputs.tensors, strict=True)]

    def _elements(self, tensors: Sequence[Tensor]) -> list[int]:
        return [math.prod(x.shape[1:]) // self.num_groups for x in tensors]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.feature_size is not None:
            destination[prefix + "feature_size"] = torch.tensor(self.feature_size)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        size = state_dict.pop(prefix + "feature_size", None)
        super()._load_from_state_dict(state_dict, prefix, *others)
        # no integers where checkpoints were averaged
        self.feature_size = None if size is None else tuple(map(round, size.tolist()))

    def grouping(self) -> str:
        return f"num_groups={self.num_groups}"


def _like(pieces: Tensor, x: Tensor) -> Tensor:
    """`pieces` in the shape and memory format of `x`."""
    if pieces.shape == x.shape:
        return pieces
    y = pieces.reshape(x.shape)
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return y.contiguous(memory_format=torch.channels_last)
    return y
