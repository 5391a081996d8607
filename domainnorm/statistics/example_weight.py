"""Inference example weighing of a whole model, and the choice of its weight (*Four Things*, §3.1)."""

from collections.abc import Callable, Sequence

from torch import nn

from ..layers import DomainBatchNorm
from .choose import refuse_torch_batch_norm

WEIGHTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def set_example_weight(model: nn.Module, weight: float) -> nn.Module:
    """Set how much a sample's own moments count in inference under population statistics, for every norm of `model`.

    Weight 0 is BatchNorm's inference, 1 is InstanceNorm's (GroupNorm's in a `GroupedBatchNorm`). No training is needed;
    `choose_example_weight` finds a good weight (inference example weighing: *Four Things*, §3.1).

    Args:
        model: any module.
        weight: the paper's α, from 0 to 1.

    Returns:
        The model.

    Raises:
        TypeError: the model has torch BatchNorms or GroupNorms, or no norm of this library; nothing was changed.
        ValueError: a weight outside [0, 1]; nothing was changed.

    Example::

        >>> bn, x = dn.DomainBatchNorm(16).eval(), torch.randn(4, 16, 8, 8)
        >>> y = dn.set_example_weight(bn, 1.0)(x)
        >>> torch.allclose(y, nn.InstanceNorm2d(16)(x), atol=1e-5)
        True
    """
    refuse_torch_batch_norm(model)
    if not 0 <= weight <= 1:
        raise ValueError(f"example weights are from 0 to 1, got {weight}")
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm):
            raise TypeError(
                f"{name or 'the model'} is a GroupNorm, which has no population statistics to weigh against: "
                "dn.convert_groupnorm(model), then dn.recompute_population_statistics"
            )
    layers = [module for module in model.modules() if isinstance(module, DomainBatchNorm)]
    if not layers:
        raise TypeError("the model has no norm of this library: dn.convert_batchnorm(model, 'DomainBatchNorm')")
    for layer in layers:
        layer.example_weight = weight
    return model


def choose_example_weight(
    model: nn.Module, score: Callable[[nn.Module], float], weights: Sequence[float] = WEIGHTS
) -> dict[float, float]:
    """Set the example weight that has the best score on a validation set (*Four Things*, §3.1).

    Args:
        model: with norms of this library; see `set_example_weight`.
        score: a function that evaluates the model, in eval mode, as it is currently set; higher is better: accuracy,
            AP, or minus a loss.
        weights: the weights to try.

    Returns:
        The score of each weight, in the given order. The model keeps the best weight (the smallest in a tie).

    Raises:
        ValueError: there is no weight to try. If `score` raises, every layer keeps its previous weight.

    Example::

        >>> model, x = nn.Sequential(dn.DomainBatchNorm(16)).eval(), 3 * torch.randn(4, 16, 8, 8)
        >>> scores = dn.choose_example_weight(model, lambda m: -(m(x).var() - 1).abs().item(), [0, 0.5, 1])
        >>> model[0].example_weight
        1.0
    """
    if not weights:
        raise ValueError("weights: expected at least one example weight to try, got none")
    before = [(layer, layer.example_weight) for layer in model.modules() if isinstance(layer, DomainBatchNorm)]
    scores: dict[float, float] = {}
    try:
        for weight in weights:
            scores[weight] = float(score(set_example_weight(model, weight)))
    finally:
        for layer, weight in before:
            layer.example_weight = weight
    set_example_weight(model, max(sorted(scores), key=lambda weight: scores[weight]))
    return scores
