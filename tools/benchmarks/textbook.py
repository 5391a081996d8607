"""The layers written as in their papers: one tensor operation after the other, without running statistics."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5


class Textbook(nn.Module):
    """γ and β, and what is done with them."""

    def __init__(self, normalize: Callable[[Tensor, Tensor, Tensor], Tensor], num_features: int) -> None:
        super().__init__()
        self.normalize = normalize
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.weight, self.bias)


def ghost(samples_per_group: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def normalize(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cat([F.batch_norm(g, None, None, weight, bias, True, eps=EPS) for g in x.split(samples_per_group)])

    return normalize


def seq_norm(num_channel_groups: int, samples_per_group: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    second = ghost(samples_per_group)
    return lambda x, weight, bias: second(F.group_norm(x, num_channel_groups, eps=EPS), weight, bias)


def batch_group(num_groups: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, weight, bias: _standardized(x.reshape(len(x), num_groups, -1), (0, 2), x, weight, bias)


def grouped(num_channel_groups: int, examples: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def normalize(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _standardized(x.reshape(len(x) // examples, examples, num_channel_groups, -1), (1, 3), x, weight, bias)

    return normalize


def batch_renorm(mean: Tensor, var: Tensor, r_max: float, d_max: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Towards population statistics `(C,)`."""

    def normalize(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own_var, own_mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        own, population = (own_var + EPS).sqrt(), _channels(var + EPS).sqrt()
        with torch.no_grad():
            r = (own / population).clamp(1 / r_max, r_max)
            d = ((own_mean - _channels(mean)) / population).clamp(-d_max, d_max)
        return ((x - own_mean) / own * r + d) * _channels(weight) + _channels(bias)

    return normalize


def weighed(mean: Tensor, var: Tensor, alpha: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Inference by the sample's own moments, weighing `alpha`, and those of the population (Four Things, Eq. 3)."""

    def normalize(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own = x.mean((2, 3), keepdim=True)
        mixed = alpha * own + (1 - alpha) * _channels(mean)
        squares = alpha * x.square().mean((2, 3), keepdim=True) + (1 - alpha) * _channels(var + mean.square())
        return (x - mixed) / (squares - mixed.square() + EPS).sqrt() * _channels(weight) + _channels(bias)

    return normalize


def _standardized(pieces: Tensor, dims: tuple[int, int], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    var, mean = torch.var_mean(pieces, dims, correction=0, keepdim=True)
    return ((pieces - mean) / (var + EPS).sqrt()).view(x.shape) * _channels(weight) + _channels(bias)


def _channels(value: Tensor) -> Tensor:
    return value.view(1, -1, 1, 1)
