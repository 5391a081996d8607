"""Domains of a whole model: which one is in use, what they are called, and a new one."""

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import DomainBatchNorm
from ..ops.moments import Moments
from ..statistics.recompute import recompute_population_statistics


class use_domain:
    """Say the domain for every norm of a model that is not told its own: `with dn.use_domain(model, 2): model(x)`.

    For models that cannot pass `domain=` on, such as torchvision's and timm's. It sets the visible attribute
    `current_domain` of every layer with several domains, at once, as `train()` sets `training`; as a context manager it
    puts back what was there. Activation checkpointing raises where it would meet another domain.

    Args:
        model: any module.
        domain: from 0; or its name; or a LongTensor `(N,)` with one for each sample; None: of none.

    Raises:
        ValueError: no layer of the model has several domains, or none of them is called so; nothing was changed.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), dn.DomainBatchNorm(16, num_domains=3))
        >>> with dn.use_domain(model, 2):
        ...     y = model(torch.randn(2, 3, 8, 8))
        >>> model[1].num_batches_tracked
        tensor([0, 0, 1])
    """

    def __init__(self, model: nn.Module, domain: int | str | Tensor | None) -> None:
        layers = with_domains(model)
        if not layers:
            raise ValueError(
                "the model has no norm with several domains: dn.convert_batchnorm(model, 'DomainBatchNorm', "
                "num_domains=…)"
            )
        index = _index(layers, domain)
        self._before = [(layer, layer.current_domain) for layer in layers]
        for layer in layers:
            layer.current_domain = index

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for layer, before in self._before:
            layer.current_domain = before


def use_domains_of(model: nn.Module, targets: Sequence[dict[str, Any]] | None) -> None:
    """`use_domain` of each target's `domain`, if the model has norms for which it must be said."""
    if layers := with_domains(model):
        if targets is None or any("domain" not in target for target in targets):
            raise ValueError("norms of the model have data sets for domains: each target needs its 'domain'")
        ids = torch.stack([target["domain"] for target in targets])
        for layer in layers:
            layer.current_domain = ids


def name_domains(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Call the domains of every norm with as many domains so, for `use_domain` and state dicts.

    Args:
        model: any module.
        names: one for each domain.

    Returns:
        The model.

    Raises:
        ValueError: names that are not different strings of one line, or no layer has that many domains; nothing was
            changed.

    Example::

        >>> model = dn.name_domains(nn.Sequential(dn.DomainBatchNorm(16, num_domains=2)), ["day", "night"])
        >>> with dn.use_domain(model, "night"):
        ...     y = model(torch.randn(2, 16, 8, 8))
    """
    if not names or len(set(names)) < len(names) or any(not name or "\n" in name for name in names):
        raise ValueError(f"expected different names of one line, got {list(names)}")
    norms = (module for module in model.modules() if isinstance(module, DomainBatchNorm))
    layers = [layer for layer in norms if _number(layer) == len(names)]
    if not layers:
        raise ValueError(f"expected names for as many domains as a norm of the model has, got {len(names)} names")
    for layer in layers:
        layer.domain_names = tuple(names)
    return model


def _number(layer: DomainBatchNorm) -> int:
    """How many domains of a layer can be named and chosen."""
    return layer.num_domains // layer.domains_per_name


def with_domains(model: nn.Module) -> list[DomainBatchNorm]:
    """The layers with several domains that can be chosen."""
    return [m for m in model.modules() if isinstance(m, DomainBatchNorm) and _number(m) > 1]


def _index(layers: Sequence[DomainBatchNorm], domain: int | str | Tensor | None) -> int | Tensor | None:
    if isinstance(domain, str):
        names = next((layer.domain_names for layer in layers if layer.domain_names), ())
        if domain not in names:
            raise ValueError(f"the domains are {list(names) or 'without names'}, got {domain!r}")
        return names.index(domain)
    if isinstance(domain, int) and not 0 <= domain < min(map(_number, layers)):
        raise ValueError(f"domains are 0 to {min(map(_number, layers)) - 1}, got {domain}")
    return domain


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
    """Give every norm of a trained model one domain more, with statistics of new, unlabelled data.

    Frozen norms stay; of a norm for pyramid levels every level gets one. What the other domains compute stays the same
    to the bit. The model runs in eval mode, as for predictions, with the minibatch statistics of its norms (*Rethinking
    "Batch"*, §5.1, Table 4); then it is used with `dn.use_domain(model, name)`, and is trained on as any other.

    Args:
        model: with norms of this library.
        batches: whatever `model(batch)` takes in eval mode. A detector that takes its images one by one needs batches
            of one image, and `method="exact"` then makes one population of them.
        name: of the new domain. Those without names so far are called "0", "1", …
        like: the domain whose affine, where each has its own, the new one begins with.
        num_samples, method, progress: of `dn.recompute_population_statistics`.

    Returns:
        The model.

    Raises:
        ValueError: no norm to extend, a name that is taken, or no batches. Whatever is raised, the model is left as it
            was.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), dn.DomainBatchNorm(16))
        >>> model = dn.add_domain(model, [torch.randn(8, 3, 8, 8) for _ in range(4)], "night", progress=False)
        >>> model[1].domain_names
        ('0', 'night')
    """
    layers = [m for m in model.modules() if isinstance(m, DomainBatchNorm) and not m.frozen]
    if not layers:
        raise ValueError("the model has no norm of this library that follows its batches")
    for layer in layers:
        names = layer.domain_names or tuple(str(k) for k in range(_number(layer)))
        if name in names:
            raise ValueError(f"there is a domain {name!r} already: {list(names)}")
    source = _index(layers, like)
    if not isinstance(source, int):
        raise ValueError(f"like= takes a domain that the model has, got {like!r}")
    before = {layer: dict(vars(layer)) for layer in layers}
    for state in before.values():
        state |= {part: dict(state[part]) for part in ("_parameters", "_buffers")}
    try:
        for layer in layers:
            _extend(layer, name, source)
        with use_domain(model, name):
            recompute_population_statistics(
                model, batches, num_samples, method, as_in_inference=layers, progress=progress
            )
    except BaseException:
        for layer, state in before.items():
            vars(layer).clear()
            vars(layer).update(state)
        raise
    return model


@torch.no_grad()
def _extend(layer: DomainBatchNorm, name: str, source: int) -> None:
    """A copy of row `source` (or of the rows of that name) at the end of what each domain has of its own."""
    names = layer.domain_names or tuple(str(k) for k in range(_number(layer)))
    per, single = layer.domains_per_name, layer.num_domains == 1
    layer.domain_names = (*names, name)
    layer.num_domains += per

    def longer(value: Tensor) -> Tensor:
        rows = value[None] if single else value
        return torch.cat([rows, rows[source * per : (source + 1) * per]])

    for key, value in dict(layer.named_buffers(recurse=False)).items():
        if layer.population_statistics == "per_domain":
            setattr(layer, key, longer(value))
    for key, parameter in dict(layer.named_parameters(recurse=False)).items():
        if layer.affine == "per_domain":
            setattr(layer, key, nn.Parameter(longer(parameter), parameter.requires_grad))


def merge_domains(model: nn.Module) -> nn.Module:
    """Make all domains that names stand for one, in place: for data of no known domain.

    The population statistics become the moments of the union of the domains, each weighing the same (a level's stay
    apart), and an affine of each domain their mean.

    Args:
        model: any module.

    Returns:
        The model.

    Example::

        >>> model = dn.merge_domains(nn.Sequential(dn.DomainBatchNorm(16, num_domains=3)))
        >>> model[0].num_domains
        1
    """
    for layer in with_domains(model):
        number = _number(layer)
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


def keep_domain(model: nn.Module, domain: int | str) -> nn.Module:
    """Leave of the domains that names stand for this one only, in place: for deployment.

    Args:
        model: with norms of several domains.
        domain: its number, from 0, or its name.

    Returns:
        The model.

    Raises:
        ValueError: none of them is called so, or no norm of the model has several; nothing was changed.

    Example::

        >>> model = dn.keep_domain(nn.Sequential(dn.DomainBatchNorm(16, num_domains=3)), 2)
        >>> model[0].running_mean.shape
        torch.Size([16])
    """
    layers = with_domains(model)
    if not layers:
        raise ValueError(f"the model has no norm with several domains, got domain {domain!r}")
    index = _index(layers, domain)
    if not isinstance(index, int):
        raise ValueError(f"domain takes a number from 0 or a name, got {domain!r}")
    for layer in layers:
        number = _number(layer)
        layer.num_domains, layer.domain_names, layer.current_domain = layer.domains_per_name, None, None
        for key, value in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if (layer.affine if key in ("weight", "bias") else layer.population_statistics) == "per_domain":
                rows = value.detach().unflatten(0, (number, -1))[index]  # (L, C), or (L) of steps
                kept = (rows if layer.domains_per_name > 1 else rows[0]).clone()
                setattr(layer, key, nn.Parameter(kept, value.requires_grad) if key in ("weight", "bias") else kept)
    return model
