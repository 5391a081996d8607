"""A case of the audit's study: a fault in one variant of a model, and the same model repaired."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import audit_training as training
import torch
from audit_models import Plain, mobile, residual
from torch import Tensor, nn


@dataclass(frozen=True)
class Variant:
    """Number k of a fault: its strength, architecture, width, and batch.

    Attributes:
        k: 0 to 5.
        fresh: of other seeds, and other batches for each architecture, than those the checks were made with.
    """

    k: int
    fresh: bool = False

    @property
    def seed(self) -> int:
        return self.k + 1000 * self.fresh

    @property
    def batch(self) -> int:
        return (8, 16, 32)[(self.k + self.fresh) % 3]

    @property
    def width(self) -> int:
        return (8, 16, 24)[self.k // 2 % 3]

    @property
    def size(self) -> int:
        return 16 if self.architecture == "plain" else 32

    @property
    def architecture(self) -> str:
        return ("plain", "residual", "mobile")[self.k // 2 % 3]

    def model(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
        """As it is before training."""
        if self.architecture == "plain":
            return Plain(self.width, norm)
        return residual(norm) if self.architecture == "residual" else mobile(norm)

    def trained(self, steps: int = 120, shift: float = 0.0) -> nn.Module:
        """With nothing wrong."""
        return copy.deepcopy(_trained(self, steps, shift))

    def train(self, model: nn.Module, steps: int = 120, rate: float = 0.02, **options: Any) -> nn.Module:
        """On this variant's batches."""
        return training.train(model, training.classify(self.batch, self.size, **options), steps, rate)

    def batches(self, count: int = 8, shift: float = 0.0) -> list[Tensor]:
        return training.batches(count, self.batch, self.size, shift)


@functools.lru_cache(maxsize=8)
def _trained(variant: Variant, steps: int, shift: float) -> nn.Module:
    torch.manual_seed(variant.seed)
    return variant.train(variant.model(), steps, source=lambda step: shift)


@dataclass
class Given:
    """What `dn.audit` is called with.

    Attributes:
        model, batches: as it takes them.
        options: its keyword arguments.
        layers: names of those that the fault is in; none: it is in all.
    """

    model: nn.Module
    batches: Any
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """One fault, planted on purpose.

    Attributes:
        check, kind: of the finding that has to name it.
        build: `build(variant, planted)`; not planted, it is the repaired twin.
        threshold: the field of `Thresholds` that decides; "" where there is nothing to measure.
        first: whether that finding has to come first; otherwise another one's symptom is as bad.
    """

    check: str
    kind: str
    build: Callable[[Variant, bool], Given]
    threshold: str = ""
    first: bool = True

    def given(self, variant: Variant, planted: bool) -> Given:
        """One case."""
        torch.manual_seed(100 + variant.seed)
        return self.build(variant, planted)


def norms_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and layers of its BatchNorms."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
