"""Slow and obvious versions of what the library computes, in plain autograd."""

import torch
from torch import Tensor


def elements(x: Tensor) -> Tensor:
    """`(N, C, *)` -> `(C, all elements of the channel)`."""
    return x.transpose(0, 1).flatten(1)


class ReferenceDomainBatchNorm:
    """formulas of Table 5, one element at a time: statistics of concatenated elements, EMA in a Python loop."""

    def __init__(self, layer):
        self.layer = layer
        domains, channels = layer.num_domains, layer.num_features
        one = layer.population_statistics == "shared"
        self.mean = [torch.zeros(channels, dtype=torch.float64) for _ in range(1 if one else domains)]
        self.var = [torch.ones(channels, dtype=torch.float64) for _ in range(1 if one else domains)]
        self.steps = [0] * len(self.mean)

    def train_step(self, xs: list[Tensor], weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
        layer = self.layer
        own = [elements(x) for x in xs]
        normalizing = [torch.cat(own, 1)] * len(xs) if layer.sgd_statistics == "shared" else own
        outputs = []
        for x, batch, weight, bias in zip(xs, normalizing, weights, biases, strict=True):
            shape = (1, -1, *[1] * (x.ndim - 2))
            if x.numel() == 0:
                outputs.append(x * weight.view(shape))
                continue
            mean, var = batch.mean(1), batch.var(1, correction=0)
            normalized = (x - mean.view(shape)) / (var + layer.eps).sqrt().view(shape)
            outputs.append(normalized * weight.view(shape) + bias.view(shape))
        if layer.population_statistics == "shared" and layer.sgd_statistics == "shared":
            self._ema(0, torch.cat(own, 1))
        else:
            for k, batch in enumerate(own):
                self._ema(0 if layer.population_statistics == "shared" else k, batch)
        return outputs

    def _ema(self, k: int, batch: Tensor) -> None:
        batch = batch.detach().double()
        if batch.shape[1] == 0:
            return
        self.steps[k] += 1
        momentum = 1 / self.steps[k] if self.layer.momentum is None else self.layer.momentum
        self.mean[k] = (1 - momentum) * self.mean[k] + momentum * batch.mean(1)
        if batch.shape[1] > 1:
            self.var[k] = (1 - momentum) * self.var[k] + momentum * batch.var(1)
