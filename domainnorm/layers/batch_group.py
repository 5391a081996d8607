"""All samples and one of G pieces of the flattened features normalized together."""

import math
from typing import Any

import torch
from torch import Tensor

from ..moments import Moments
from .domain_batch_norm import DomainBatchNorm
from .domains import DomainBatch


class BatchGroupNorm(DomainBatchNorm):
    """Statistics over all samples × one of G equal, consecutive pieces of the flattened features (BGN, Eq. 8-9).

    `(N, C, H, W)` is flattened to D = C · H · W numbers a sample. With G = C it is BatchNorm. γ and β are per channel,
    the population statistics per piece, `(G,)`. Where pieces are not whole channels, the layer works at one feature
    size: the first it sees in training, which is in its state dict as `feature_size`.

    Args:
        num_features: C.
        num_groups: G; divides D.
        **options: of `DomainBatchNorm`, `sync` too.

    Raises:
        ValueError: from the constructor, G < 1; from the call, G does not divide D, or another feature size than
            before where pieces are not whole channels.
    """

    per_channel = False

    def __init__(self, num_features: int, num_groups: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        if num_groups < 1:
            raise ValueError(f"num_groups takes a positive number, got {num_groups}")
        self.num_groups = num_groups
        self.feature_size: tuple[int, ...] | None = None  # where pieces are not whole channels
        self._register_statistics(num_groups, {"device": options.get("device"), "dtype": options.get("dtype")})

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        self.feature_size = None

    def _pieces(self, x: Tensor) -> Tensor:
        """`x` as rows `(N, R, *)` that lie within one channel and one piece, as long as can be."""
        size, spatial = math.prod(x.shape[1:]), math.prod(x.shape[2:])
        if self.num_features % self.num_groups == 0:
            return x
        if size % self.num_groups:
            divisors = [d for d in range(1, size + 1) if size % d == 0]
            nearest = sorted(divisors, key=lambda d: abs(d - self.num_groups))[:2]
            raise ValueError(
                f"num_groups takes a divisor of D = {' x '.join(map(str, x.shape[1:]))} = {size}, got G = "
                f"{self.num_groups}; the nearest are {' and '.join(map(str, sorted(nearest)))}"
            )
        if self.feature_size not in (None, tuple(x.shape[2:])) and len(x):
            raise ValueError(
                f"num_groups={self.num_groups} splits {self.num_features} channels in space, so the layer works at one "
                f"feature size: expected {self.feature_size}, got {tuple(x.shape[2:])}; use a divisor of "
                f"{self.num_features}"
            )
        length = max(math.gcd(size // self.num_groups, spatial), 1)
        return x.reshape(len(x), size // length, length)

    def _normalize(self, batch: DomainBatch, merged: Moments) -> list[Tensor]:
        outputs = super()._normalize(batch, merged)
        if self.training and self.num_features % self.num_groups:
            for x in batch.tensors:
                if x.numel():
                    self.feature_size = tuple(x.shape[2:])
        return outputs

    def _elements(self, x: Tensor) -> int:
        return math.prod(x.shape[1:]) // self.num_groups

    def _moments(self, x: Tensor) -> tuple[Moments, Moments]:
        rows = Moments.rows(self._pieces(x))
        if not math.prod(x.shape[1:]):
            none = rows.mean.new_zeros(len(x), self.num_groups)
            return rows, Moments(none[:, :1], none, none)
        return rows, rows.merge_channels(self.num_groups)

    def _normalize_by(
        self, x: Tensor, rows: Moments, of: Moments, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        pieces, weight, bias = self._by_piece(x, weight, bias)
        of = of.repeat_channels(pieces.shape[1] // self.num_groups)
        return _like(super()._normalize_by(pieces, rows, of, weight, bias), x)

    def _normalize_fixed(
        self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        pieces, weight, bias = self._by_piece(x, weight, bias)
        of = Moments(torch.ones_like(mean), mean, var).repeat_channels(pieces.shape[1] // self.num_groups)
        return _like(super()._normalize_fixed(pieces, of.mean, of.var, weight, bias), x)

    def _by_piece(self, x: Tensor, *affine: Tensor | None) -> tuple[Any, ...]:
        pieces = self._pieces(x)
        times = pieces.shape[1] // self.num_features
        return pieces, *(v if v is None or times == 1 else v.repeat_interleave(times, -1) for v in affine)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.feature_size is not None:
            destination[prefix + "feature_size"] = torch.tensor(self.feature_size)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        size = state_dict.pop(prefix + "feature_size", None)
        super()._load_from_state_dict(state_dict, prefix, *others)
        self.feature_size = None if size is None else tuple(size.tolist())

    def grouping(self) -> str:
        return f"num_groups={self.num_groups}"


def _like(pieces: Tensor, x: Tensor) -> Tensor:
    """`pieces` in the shape and memory format of `x`."""
    y = pieces.reshape(x.shape)
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return y.contiguous(memory_format=torch.channels_last)
    return y
