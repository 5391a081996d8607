"""The domain whose statistics an input is most like."""

from typing import Any

import torch
from torch import nn

from ..layers import DomainBatchNorm
from ..layers.inputs import LayerInput
from ..statistics.preserve import preserve_state
from ..statistics.virtual_batch import WithExtra
from .domains import use_domain, with_domains


@torch.no_grad()
def nearest_domain(model: nn.Module, *inputs: Any) -> int | str:
    """Find the domain whose population statistics are closest to those of `inputs`, at the first norm that they reach.

    The distance is the symmetrized Kullback-Leibler divergence of normal distributions, averaged over channels. The
    model, in eval mode, runs as `model(*inputs)` up to that norm (in a `dn.virtual_batch`, without its extra images).
    It is not changed.

    Args:
        model: with norms that have several domains.
        *inputs: the arguments of the model.

    Returns:
        The number of the domain, from 0; or its name, if the layers of the model number their names differently.

    Raises:
        ValueError: the inputs reach no norm with statistics for several domains, or have no sample or numbers that are
            not finite there.

    Example::

        >>> model = nn.Sequential(dn.DomainBatchNorm(16, num_domains=2)).eval()
        >>> model[0].running_mean[1] = 5
        >>> dn.nearest_domain(model, 5 + torch.randn(4, 16, 8, 8))
        1
    """
    layers = with_domains(model)
    try:
        with preserve_state(model):
            use_domain(model, 0)
            for module in model.modules():
                if isinstance(forward := vars(module).get("forward"), WithExtra):
                    module.forward = forward.alone
            for layer in layers.values():
                if layer.running_mean is not None and layer.population_statistics == "per_domain":
                    layer.batch_hook = _stop
            model(*inputs)
    except _Reached as reached:
        layer, inputs = reached.args
    else:
        raise ValueError("no norm that the input reaches has population statistics for several domains")
    per = layer.domains_per_name
    own = layer.moments_of_domains(inputs)[:per]  # (L, C): it is domain 0 for now
    if not own.count.any() or not (own.mean.isfinite().all() and own.var.isfinite().all()):
        what = "numbers that are not finite" if own.count.any() else "no sample"
        raise ValueError(f"the first norm of several domains is reached by {what}: no domain is nearest")
    mean, var = (v.unflatten(0, (-1, per)).to(own.mean.dtype) for v in (layer.running_mean, layer.running_var))
    here, there = own.var + layer.eps, var + layer.eps  # (L, C), (D, L, C)
    gap = (own.mean - mean).square()
    divergence = here / there + there / here - 2 + gap / here + gap / there
    nearest = int(torch.where(own.count > 0, divergence, 0).sum((1, 2)).argmin())
    names = {other.domain_names for other in layers.values() if other.domain_names}
    return nearest if len(names) < 2 or layer.domain_names is None else layer.domain_names[nearest]


class _Reached(Exception):
    """Ends a forward pass: at this layer, with this batch."""


def _stop(layer: DomainBatchNorm, inputs: LayerInput) -> None:
    raise _Reached(layer, inputs)
