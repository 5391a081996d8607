"""More domains of a whole model, or fewer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import DomainBatchNorm
from ..ops.moments import Moments
from ..statistics.preserve import unchanged_on_error
from ..statistics.recompute import recompute_population_statistics
from .domains import number_of_domains, rows_of, use_domain, with_domains


@unchanged_on_error
def add_domain(
    model: nn.Module,
    batches: Iterable[Any],
    name: str,
    *,
    like: int | str = 0,
    num_samples: int = 10_000,
    method: str = "pooled",
    progress: bool = True,
) -> nn.Module:
    """Add a domain to every norm of a trained model, with statistics from new, unlabelled data.

    In a norm for pyramid levels, every level gets the domain. The outputs for the other domains stay the same to the
    bit: norms with shared population statistics get a copy of these for each domain. Frozen norms with one domain stay
    as they are; those with several get a copy of `like`. The model runs in eval mode, as for predictions, and its norms
    use minibatch statistics (*Rethinking "Batch"*, §5.1, Table 4). Afterwards, use the domain with
    `dn.use_domain(model, name)`; it can be trained like any other.

    Args:
        model: with norms of this library.
        batches: whatever `model(batch)` takes in eval mode. A detector that takes its images one by one needs batches
            of one image; `method="exact"` then makes one population of them.
        name: of the new domain. Domains without names get "0", "1", …
        like: number or name of the domain whose affine the new one starts with, if each domain has its own.
        num_samples, method, progress: as in `dn.recompute_population_statistics`.

    Returns:
        The model.

    Raises:
        ValueError: there is no norm to extend, the name is taken, or there are no batches. The model is left unchanged,
            whatever is raised.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), dn.DomainBatchNorm(16))
        >>> model = dn.add_domain(model, [torch.randn(8, 3, 8, 8) for _ in range(4)], "night", progress=False)
        >>> model[1].domain_names
        ('0', 'night')
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, DomainBatchNorm)}
    following = [layer for layer in norms.values() if not layer.frozen]
    if not following:
        raise ValueError("the model has no norm of this library that follows its batches")
    layers = {n: m for n, m in norms.items() if not m.frozen or number_of_domains(m) > 1}
    for layer in layers.values():
        names = _names(layer)
        if name in names:
            raise ValueError(f"there is a domain {name!r} already: {list(names)}")
    if not isinstance(like, (int, str)):
        raise ValueError(f"like= takes a domain that the model has, got {like!r}")
    rows = rows_of(with_domains(model) or layers, like)
    for key, layer in layers.items():
        _extend(layer, name, rows.get(key, 0))
    with use_domain(model, name):
        recompute_population_statistics(
            model, batches, num_samples, method, as_in_inference=following, progress=progress
        )
    return model


def _names(layer: DomainBatchNorm) -> tuple[str, ...]:
    return layer.domain_names or tuple(str(k) for k in range(number_of_domains(layer)))


@torch.no_grad()
def _extend(layer: DomainBatchNorm, name: str, source: int) -> None:
    """A copy of row `source` (or of the rows of that name) at the end of what each domain has of its own."""
    before, per = layer.num_domains, layer.domains_per_name
    layer.domain_names = (*_names(layer), name)
    layer.num_domains += per

    def longer(value: Tensor, is_per_domain: bool) -> Tensor:
        rows = value if is_per_domain and before > 1 else value.expand(before, *value.shape)
        return torch.cat([rows, rows[source * per : (source + 1) * per]])

    for key, value in dict(layer.named_buffers(recurse=False)).items():
        setattr(layer, key, longer(value, layer.population_statistics == "per_domain"))
    layer.population_statistics = "per_domain"
    for key, parameter in dict(layer.named_parameters(recurse=False)).items():
        if layer.affine == "per_domain":
            setattr(layer, key, nn.Parameter(longer(parameter, True), parameter.requires_grad))


@unchanged_on_error
def merge_domains(model: nn.Module) -> nn.Module:
    """Merge all domains that can be named into one, in place: for data whose domain is unknown.

    The population statistics become the moments of the union of the domains, all weighted equally (pyramid levels stay
    separate). If each domain has its own affine, their mean is used.

    Args:
        model: any module.

    Returns:
        The model.

    Example::

        >>> model = dn.merge_domains(nn.Sequential(dn.DomainBatchNorm(16, num_domains=3)))
        >>> model[0].num_domains
        1
    """
    for layer in with_domains(model).values():
        number = number_of_domains(layer)
        layer.num_domains, layer.domain_names, layer.current_domain = layer.domains_per_name, None, None
        own = (layer.domains_per_name,) if layer.domains_per_name > 1 else ()

        def parts(value: Tensor, number: int = number) -> Tensor:
            return value.detach().unflatten(0, (number, -1))  # (D, L, C)

        if layer.population_statistics == "per_domain" and (population := layer.population) is not None:
            mean = parts(population.mean)
            for name, var in (("running_var", population.var), ("running_total_var", population.total_var)):
                if var is not None:
                    merged = Moments(torch.ones_like(mean[..., :1]), mean, parts(var)).merge(0)
                    layer.running_mean = merged.mean.view(*own, -1).clone()
                    setattr(layer, name, merged.var.view(*own, -1).clone())
            layer.num_batches_tracked = parts(population.num_batches_tracked).sum(0).view(own)
        for key, value in dict(layer.named_parameters(recurse=False)).items() if layer.affine == "per_domain" else ():
            setattr(layer, key, nn.Parameter(parts(value).mean(0).view(*own, -1), value.requires_grad))
    return model


@unchanged_on_error
def keep_domain(model: nn.Module, domain: int | str) -> nn.Module:
    """Keep only one of the domains that can be named, in place: for deployment.

    Args:
        model: with norms that have several domains.
        domain: its number, from 0, or its name.

    Returns:
        The model.

    Raises:
        ValueError: there is no such domain, or no norm of the model has several; nothing was changed.

    Example::

        >>> model = dn.keep_domain(nn.Sequential(dn.DomainBatchNorm(16, num_domains=3)), 2)
        >>> model[0].running_mean.shape
        torch.Size([16])
    """
    layers = with_domains(model)
    if not layers:
        raise ValueError(f"the model has no norm with several domains, got domain {domain!r}")
    if not isinstance(domain, (int, str)):
        raise ValueError(f"domain takes a number from 0 or a name, got {domain!r}")
    for name, index in rows_of(layers, domain).items():
        layer = layers[name]
        number = number_of_domains(layer)
        layer.num_domains, layer.domain_names, layer.current_domain = layer.domains_per_name, None, None
        for key, value in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if (layer.affine if key in ("weight", "bias") else layer.population_statistics) == "per_domain":
                rows = value.detach().unflatten(0, (number, -1))[index]  # (L, C), or (L) of steps
                kept = (rows if layer.domains_per_name > 1 else rows[0]).clone()
                setattr(layer, key, nn.Parameter(kept, value.requires_grad) if key in ("weight", "bias") else kept)
    return model
