"""The forward pass of a layer, or of several at equal depth of parallel branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..ops.normalize import normalize
from .inputs import Domains, Input, check_equal_sizes

if TYPE_CHECKING:
    from .domain_batch_norm import DomainBatchNorm


def normalize_layers(
    layers: Sequence[DomainBatchNorm], inputs: Sequence[Input], domain: Domains | None = None
) -> list[Input]:
    """`[layer(x, domain) for layer, x in zip(layers, inputs)]` with one collective for all layers.

    For layers at the same depth of parallel branches, such as the two towers of RetinaNet's head. The inputs must have
    equal `N` and spatial sizes, the layers the same `num_domains`, `sync` and `statistics`.

    Args:
        layers: the layers to call together.
        inputs: one input per layer, a tensor or a list.
        domain: of all inputs, as in the call of a layer.

    Returns:
        The output of each layer.

    Raises:
        ValueError: the layers are synchronized, and their inputs have different sizes.
    """
    given = [layer._input(x, domain) for layer, x in zip(layers, inputs, strict=True)]
    problems = [layer.normalization(own) for layer, own in zip(layers, given, strict=True)]
    if problems[0].sync is not None:
        check_equal_sizes(given)
        outputs = normalize(problems)
    else:
        outputs = [normalize([problem])[0] for problem in problems]
    outputs = [layer._restore(ys, own) for layer, ys, own in zip(layers, outputs, given, strict=True)]
    return [ys if isinstance(x, (list, tuple)) else ys[0] for x, ys in zip(inputs, outputs, strict=True)]
