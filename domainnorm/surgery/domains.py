"""Domains of a whole model: which one is in use, and what they are called."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import DomainBatchNorm


class use_domain:
    """Set the domain for every norm of a model that is not given one: `with dn.use_domain(model, 2): model(x)`.

    For models that cannot pass `domain=` on, such as torchvision's and timm's. It sets the attribute `current_domain`
    of every layer with several domains immediately, as `train()` sets `training`. As a context manager, it restores the
    previous values at the end. Activation checkpointing raises if it recomputes under another domain.

    Args:
        model: any module.
        domain: a number, from 0; a name; a LongTensor `(N,)` with one number per sample; or None: no domain.

    Raises:
        ValueError: no layer of the model has several domains, or there is no such domain; nothing was changed.

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
        rows = rows_of(layers, domain)
        self._model = model
        self._before = {name: (layer.num_domains, layer.current_domain) for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.current_domain = rows[name]

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """By the names of the layers: the block may have exchanged them, or left some of their domains."""
        for name, layer in with_domains(self._model).items():
            number, before = self._before.get(name, (0, None))
            layer.current_domain = before if number <= layer.num_domains else None


def use_domains_of(model: nn.Module, targets: Sequence[dict[str, Any]] | None) -> None:
    """`use_domain` of each target's `domain`, if the model has norms for which it must be said."""
    if layers := with_domains(model):
        if targets is None or any("domain" not in target for target in targets):
            raise ValueError("norms of the model have data sets for domains: each target needs its 'domain'")
        ids = torch.stack([target["domain"] for target in targets])
        for layer in layers.values():
            layer.current_domain = ids


def name_domains(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Name the domains of every norm with as many domains as `names`, for `use_domain` and state dicts.

    Args:
        model: any module.
        names: one name per domain.

    Returns:
        The model.

    Raises:
        ValueError: the names are not distinct one-line strings, or no layer has that many domains; nothing was changed.

    Example::

        >>> model = dn.name_domains(nn.Sequential(dn.DomainBatchNorm(16, num_domains=2)), ["day", "night"])
        >>> with dn.use_domain(model, "night"):
        ...     y = model(torch.randn(2, 16, 8, 8))
    """
    if not names or len(set(names)) < len(names) or any(not name or "\n" in name for name in names):
        raise ValueError(f"expected different names of one line, got {list(names)}")
    norms = (module for module in model.modules() if isinstance(module, DomainBatchNorm))
    layers = [layer for layer in norms if number_of_domains(layer) == len(names)]
    if not layers:
        raise ValueError(f"expected names for as many domains as a norm of the model has, got {len(names)} names")
    for layer in layers:
        layer.domain_names = tuple(names)
    return model


def number_of_domains(layer: DomainBatchNorm) -> int:
    """How many domains of a layer can be named and chosen."""
    return layer.num_domains // layer.domains_per_name


def with_domains(model: nn.Module) -> dict[str, DomainBatchNorm]:
    """The layers with several domains that can be chosen, by their names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, DomainBatchNorm) and number_of_domains(m) > 1}


def rows_of(layers: Mapping[str, DomainBatchNorm], domain: Any) -> dict[str, Any]:
    """What `domain` is in each layer: a name is looked up in the names of each; a number, and ids, are the same in all.

    A layer without names has those of the layers with as many domains.

    Raises:
        ValueError: some layer has no such domain.
    """
    if not isinstance(domain, str):
        if isinstance(domain, int):
            for name, layer in layers.items():
                if not 0 <= domain < number_of_domains(layer):
                    where = f", which {name} does not have" if name else ""
                    raise ValueError(f"domains are 0 to {number_of_domains(layer) - 1}, got {domain}{where}")
        return dict.fromkeys(layers, domain)
    rows = {}
    for name, layer in layers.items():
        names = layer.domain_names
        if names is None:
            known = {
                n for m in layers.values() if (n := m.domain_names) is not None and len(n) == number_of_domains(layer)
            }
            if len(known) != 1:
                which = f"those of others are called {sorted(known)}" if known else "no other with as many has any"
                raise ValueError(
                    f"the domains of {name or 'the model'} are without names, and {which}: got {domain!r}; "
                    "dn.name_domains names them"
                )
            names = known.pop()
        if domain not in names:
            raise ValueError(f"the domains of {name or 'the model'} are {list(names)}, got {domain!r}")
        rows[name] = names.index(domain)
    return rows
