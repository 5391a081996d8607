"""The population statistics that a norm keeps, and whether it normalizes by them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.population import Population

STATISTICS = ("auto", "minibatch", "population")


class PopulationStatistics(nn.Module):
    """Buffers of one domain `(C,)`, or of each `(K, C)`, their EMA, and the choice of what normalizes.

    See `DomainBatchNorm` for the attributes.
    """

    averages_deviation = False  # whether the EMA is that of √(variance + eps), and not of the unbiased variance
    num_domains: int
    population_statistics: str
    eps: float
    momentum: float | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False
        self.statistics = "auto"
        self.example_weight = 0.0
        self.domain_names: tuple[str, ...] | None = None
        self.domains_per_name = 1

    def _register_statistics(self, width: int, factory: dict[str, Any]) -> None:
        """Buffers of `width` means and variances a domain."""
        domains = (self.num_domains,) if self.population_statistics == "per_domain" and self.num_domains > 1 else ()
        self.register_buffer("running_mean", torch.zeros(*domains, width, **factory))
        self.register_buffer("running_var", torch.ones(*domains, width, **factory))
        self.register_buffer("num_batches_tracked", torch.zeros(domains, dtype=torch.long, device=factory["device"]))

    @property
    def statistics(self) -> str:
        return "population" if self.frozen else self._statistics

    @statistics.setter
    def statistics(self, value: str) -> None:
        one_of("statistics", value, STATISTICS)
        self._statistics = value

    @property
    def example_weight(self) -> float:
        return self._example_weight

    @example_weight.setter
    def example_weight(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"example_weight takes a number from 0 to 1, got {value}")
        self._example_weight = float(value)

    @property
    def uses_minibatch(self) -> bool:
        """Whether the next forward normalizes by the statistics of its input."""
        return self.training if self.statistics == "auto" else self.statistics == "minibatch"

    @property
    def population(self) -> Population:
        """The running statistics, and how a training step moves them."""
        buffers = (self.running_mean, self.running_var, self.num_batches_tracked)
        return Population(*buffers, self.momentum, self.averages_deviation, self.eps)

    def reset_running_stats(self) -> None:
        """Population statistics as at construction: mean 0, variance 1, no step counted."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.domain_names is not None:
            text = "\n".join(self.domain_names).encode()
            destination[prefix + "domain_names"] = torch.tensor(list(text), dtype=torch.uint8)

    def _load_names(self, state_dict: Any, prefix: str, errors: list[str]) -> None:
        """Names of the checkpoint become this layer's or, if it has its own, its rows are taken by name."""
        saved = state_dict.pop(prefix + "domain_names", None)
        if saved is None:
            return
        names = tuple(bytes(saved.tolist()).decode().split("\n"))
        per = self.domains_per_name
        if self.domain_names is None and len(names) * per == self.num_domains:
            self.domain_names = names
        own = self.domain_names or names
        if missing := [name for name in own if name not in names]:
            errors.append(
                f"{prefix}domain_names: the checkpoint has the domains {list(names)}, this layer {list(own)}; "
                f"{missing[0]!r} has no statistics there: train it, or dn.add_domain after loading"
            )
            return
        rows = torch.tensor([names.index(name) * per + k for name in own for k in range(per)])
        for name in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias"):
            value = state_dict.get(prefix + name)
            if value is not None and value.ndim == (1 if name == "num_batches_tracked" else 2):
                state_dict[prefix + name] = value[rows.to(value.device)]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Statistics and affine of one domain, `(C,)`, are repeated for each domain of `(K, C)`."""
        self._load_names(state_dict, prefix, errors)
        for name, own in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
            key = prefix + name
            if name == "num_batches_tracked":
                state_dict.setdefault(key, own)  # absent in checkpoints of frozen layers and of torch < 0.4
            value = state_dict.get(key)
            if value is None or value.shape == own.shape:
                continue
            if own.shape[1:] == value.shape and own.ndim == value.ndim + 1:
                state_dict[key] = value.expand_as(own).clone()  # each domain its own memory, also with assign=True
            elif value.shape[1:] == own.shape and value.ndim == own.ndim + 1:
                choice = "affine" if name in ("weight", "bias") else "population_statistics"
                errors.append(
                    f"{key}: the checkpoint has one per domain, {tuple(value.shape)}, this layer one for all, "
                    f"{tuple(own.shape)}: build it with num_domains={value.shape[0]}, {choice}='per_domain', or select "
                    "one domain's row before loading"
                )
                state_dict[key] = own
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


def one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    """ValueError if `value` is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} takes one of {list(choices)}, got {value!r}")
