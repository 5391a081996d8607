"""The layers of a model that normalize by population statistics, whoever wrote them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import UserError
from ..layers import BatchRenorm, DomainBatchNorm

_INSTANCE_NORM = nn.modules.instancenorm._InstanceNorm


@dataclass(frozen=True)
class Norm:
    """A layer, and what it was before anything ran.

    Attributes:
        name: in the model.
        module: the layer.
        mean, var: its running statistics `(K, C)` in float64, K = 1 where all domains share them.
        dtype: of the running variance.
        initial: whether they are as at construction, mean 0 and variance 1.
        tracked: how many batches they are an average of, the fewest of any domain; None: not known.
        frozen: whether training normalizes by them, too.
        fixed: whether the class itself has no other way (`FrozenBatchNorm2d`).
        training: whether it was in training mode.
    """

    name: str
    module: nn.Module
    mean: Tensor
    var: Tensor
    dtype: torch.dtype
    initial: bool
    tracked: int | None
    frozen: bool
    fixed: bool
    training: bool

    @property
    def ours(self) -> bool:
        """Whether it is a layer of this library."""
        return isinstance(self.module, DomainBatchNorm)

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self.module).__name__

    @property
    def eps(self) -> float:
        return float(getattr(self.module, "eps", 1e-5))

    @property
    def momentum(self) -> float | None:
        """Momentum of the EMA; None: a cumulative average."""
        return getattr(self.module, "momentum", None)

    @property
    def shared_sgd(self) -> bool:
        """Whether training normalizes all domains of an input together."""
        return isinstance(self.module, DomainBatchNorm) and self.module.sgd_statistics == "shared"

    @property
    def is_corrected(self) -> bool:
        """Whether training is corrected towards the population statistics, as Batch Renorm is."""
        return isinstance(self.module, BatchRenorm)

    @property
    def follows_batches(self) -> bool:
        """Whether training normalizes by minibatch statistics, and inference by population statistics."""
        if self.frozen:
            return False
        return not isinstance(self.module, DomainBatchNorm) or self.module.statistics == "auto"

    def samples_per_group(self, samples: int) -> int:
        """How many samples of an input training normalizes together."""
        groups = self.module.sample_groups if isinstance(self.module, DomainBatchNorm) else None
        if groups is None:
            return samples
        return min(samples, groups.size or math.ceil(samples / (groups.number or 1)))

    def row(self, domain: int) -> int:
        """Which of its running statistics are those of a domain."""
        return domain if self.mean.shape[0] > 1 else 0


def find_norms(model: nn.Module) -> list[Norm]:
    """The layers of `model` that keep running statistics, in the order of its modules.

    Raises:
        UserError: layers that take their shape from the first batch, or TorchScript, whose layers cannot be observed.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError("the model is of TorchScript, whose layers cannot be observed: audit the model it was made of")
    learns = any(p.requires_grad for p in model.parameters())
    found = []
    for name, module in model.named_modules():
        if any(is_lazy(value) for value in (*module._parameters.values(), *module._buffers.values())):
            raise UserError(f"{name or 'the model'} has no shape yet: run the model on one batch before it is audited")
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(module, _INSTANCE_NORM) or not (isinstance(mean, Tensor) and isinstance(var, Tensor)):
            continue
        tracked = getattr(module, "num_batches_tracked", None)
        found.append(
            Norm(
                name or type(module).__name__,
                module,
                mean.detach().double().reshape(-1, mean.shape[-1]).clone(),
                var.detach().double().reshape(-1, var.shape[-1]).clone(),
                var.dtype,
                bool((mean == 0).all() and (var == 1).all()),
                int(tracked.min()) if isinstance(tracked, Tensor) else None,
                _is_frozen(model, module, learns),
                not isinstance(module, nn.modules.batchnorm._BatchNorm),
                module.training,
            )
        )
    return found


def _is_frozen(model: nn.Module, module: nn.Module, learns: bool) -> bool:
    """By its class, by its mode within a model that trains or, within one that does not, by its parameters."""
    if isinstance(module, DomainBatchNorm):
        if module.statistics == "population":
            return True
    elif not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    if model.training:
        return not module.training
    own: list[Any] = list(module.parameters(recurse=False))
    return bool(own) and learns and not module.training and not any(p.requires_grad for p in own)
