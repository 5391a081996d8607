"""Domains of a whole model: which one is in use, what they are called, and a new one."""

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .layers import DomainBatchNorm
from .population import recompute_population_statistics


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
    """

    def __init__(self, model: nn.Module, domain: int | str | Tensor | None) -> None:
        layers = _with_domains(model)
        chosen = [_index(name, layer, domain) for name, layer in layers.items()]
        self._before = [(layer, layer.current_domain) for layer in layers.values()]
        for layer, value in zip(layers.values(), chosen, strict=True):
            layer.current_domain = value

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for layer, before in self._before:
            layer.current_domain = before


def name_domains(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Call the domains of every norm with as many domains so, for `use_domain` and state dicts; returns the model.

    Raises:
        ValueError: names that are not different strings, or no layer has that many domains; nothing was changed.
    """
    if not names or len(set(names)) < len(names) or any(not name or "\n" in name for name in names):
        raise ValueError(f"expected different names of one line, got {list(names)}")
    layers = [layer for layer in _with_domains(model).values() if layer.num_domains == len(names)]
    if not layers:
        raise ValueError(f"expected names for as many domains as a norm of the model has, got {len(names)} names")
    for layer in layers:
        layer.domain_names = tuple(names)
    return model


def _with_domains(model: nn.Module) -> dict[str, DomainBatchNorm]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, DomainBatchNorm) and m.num_domains > 1}
    if not found:
        raise ValueError(
            "the model has no norm with several domains: dn.convert_batchnorm(model, 'DomainBatchNorm', num_domains=…)"
        )
    return found


def _index(name: str, layer: DomainBatchNorm, domain: int | str | Tensor | None) -> int | Tensor | None:
    if isinstance(domain, str):
        if domain not in (layer.domain_names or ()):
            raise ValueError(f"{name or 'the model'} has the domains {layer.domain_names}, got {domain!r}")
        assert layer.domain_names is not None
        return layer.domain_names.index(domain)
    if isinstance(domain, int) and not 0 <= domain < layer.num_domains:
        raise ValueError(f"{name or 'the model'}: domains are 0 to {layer.num_domains - 1}, got {domain}")
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
    """Give every norm of a trained model one domain more, with statistics of new, unlabelled data; returns the model.

    Of norms with one domain, and of those whose domains have names; others, such as those of pyramid levels, and frozen
    ones stay. What the other domains compute stays the same to the bit. The model runs in eval mode, as for
    predictions, with the minibatch statistics of its norms (*Rethinking "Batch"*, §5.1, Table 4); then it is used with
    `dn.use_domain(model, name)`, and is trained on as any other.

    Args:
        batches: whatever `model(batch)` takes in eval mode. A detector that takes its images one by one needs batches
            of one image, and `method="exact"` then makes one population of them.
        name: of the new domain. The only domain of a norm so far is called "0".
        like: the domain whose affine, where each has its own, the new one begins with.
        num_samples, method, progress: of `dn.recompute_population_statistics`.

    Raises:
        ValueError: no norm to extend, a name that is taken, or no batches; the model is left as it was.
    """
    layers = {
        key: layer
        for key, layer in model.named_modules()
        if isinstance(layer, DomainBatchNorm) and not layer.frozen and (layer.num_domains == 1 or layer.domain_names)
    }
    if not layers:
        raise ValueError("the model has no norm with one domain, or with named ones, to which one could be added")
    for key, layer in layers.items():
        if name in (layer.domain_names or ("0",)):
            raise ValueError(f"{key or 'the model'} has a domain {name!r} already: {layer.domain_names or ('0',)}")
    sources = {key: _index(key, layer, like) for key, layer in layers.items()}
    before = {layer: dict(vars(layer)) for layer in layers.values()}
    for layer in before:
        before[layer] |= {part: dict(before[layer][part]) for part in ("_parameters", "_buffers")}
    try:
        for key, layer in layers.items():
            _extend(layer, name, sources[key])
        with use_domain(model, name):
            recompute_population_statistics(
                model, batches, num_samples, method, as_in_inference=list(layers.values()), progress=progress
            )
    except BaseException:
        for layer, state in before.items():
            vars(layer).clear()
            vars(layer).update(state)
        raise
    return model


@torch.no_grad()
def _extend(layer: DomainBatchNorm, name: str, source: Any) -> None:
    """One row more in what each domain has of its own: a copy of row `source`."""
    single = layer.num_domains == 1
    layer.domain_names = (*(layer.domain_names or ("0",)), name)
    layer.num_domains += 1
    kept = ("running_mean", "running_var", "num_batches_tracked")
    for key in kept if layer.population_statistics == "per_domain" else ():
        value = layer.get_buffer(key)
        rows = value[None] if single else value
        setattr(layer, key, torch.cat([rows, rows[source : source + 1]]))
    for key in ("weight", "bias") if layer.affine == "per_domain" else ():
        value = layer.get_parameter(key)
        rows = value[None] if single else value
        setattr(layer, key, nn.Parameter(torch.cat([rows, rows[source : source + 1]]), value.requires_grad))
