"""What a norm has in common with torch's BatchNorm, and what it keeps: population statistics."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.population import Population
from .renamed import renamed_attribute

STATISTICS = ("auto", "minibatch", "population")
_TORCHS_ARGUMENTS = ("eps", "momentum", "affine", "track_running_stats")  # in the order that nn.BatchNorm2d takes them


class PopulationStatistics(nn.BatchNorm2d):
    """Buffers of one domain `(C,)`, or of each `(K, C)`, their EMA, and the choice of what normalizes.

    `isinstance` finds it where it looks for torch's BatchNorm, so that the helpers of other libraries do: they reset,
    freeze by `eval()`, average and group it. `affine` refuses those that would put another layer in its place. See
    `DomainBatchNorm` for the attributes.
    """

    averages_deviation = False  # whether the EMA is that of √(variance + eps), and not of the unbiased variance
    _renamed: ClassVar[Mapping[str, str]] = {}  # old names of arguments and attributes
    _max_positional = 1
    num_domains: int
    _affine: str | None
    population_statistics: str
    track_total_var: bool
    running_total_var: Tensor | None

    def __new__(cls, *args: Any, **options: Any) -> Any:
        if len(args) > cls._max_positional:
            raise TypeError(f"{cls.__name__} takes num_features alone by position: {_as_keywords(cls, args)}")
        return super().__new__(cls)

    def __init_subclass__(cls) -> None:
        """The signature of a layer with `**options` names those of its base; old names of attributes warn."""
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
            taken = inspect.signature(cls.__mro__[1]).parameters.values()
            own = [*own[:-1], *(p for p in taken if p.name not in {one.name for one in own})]
        cls.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        cls._max_positional = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in own)
        for old, new in cls._renamed.items():
            setattr(cls, old, renamed_attribute(old, new))

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self._frozen = False
        self._momentum: float | None = None
        self.statistics = "auto"
        self.example_weight = 0.0
        self.domain_names: tuple[str, ...] | None = None
        self.domains_per_name = 1

    def _register_statistics(self, width: int, factory: dict[str, Any]) -> None:
        """Buffers of `width` means and variances a domain, or None."""
        domains = self._domain_shape(self.population_statistics)
        self._num_statistics = width
        tracks = self.track_running_stats
        self.register_buffer("running_mean", torch.zeros(*domains, width, **factory) if tracks else None)
        self.register_buffer("running_var", torch.ones(*domains, width, **factory) if tracks else None)
        count = torch.zeros(domains, dtype=torch.long, device=factory["device"])
        self.register_buffer("num_batches_tracked", count if tracks else None)
        total = torch.ones(*domains, width, **factory) if tracks and self.track_total_var else None
        self.register_buffer("running_total_var", total)

    def _domain_shape(self, choice: str | None) -> tuple[int, ...]:
        """What stands before the channels in the shape of tensors that are, or are not, `"per_domain"`."""
        return (self.num_domains,) if choice == "per_domain" and self.num_domains > 1 else ()

    @property
    def frozen(self) -> bool:
        return self._frozen

    @frozen.setter
    def frozen(self, value: bool) -> None:
        if value and self.running_mean is None:
            raise ValueError(f"{type(self).__name__} keeps no running statistics that could be frozen")
        self._frozen = bool(value)

    @property
    def momentum(self) -> float | None:
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        first = self.__dict__.setdefault("_first_momentum", value)
        if value == 1 != first and self.frozen:  # set by fvcore's update_bn_stats, which would scale the variance
            raise RuntimeError(
                f"{type(self).__name__} is frozen, and fvcore.nn.update_bn_stats would change its statistics: put it "
                "in eval mode, or call dn.recompute_population_statistics(model, batches)"
            )
        self._momentum = value

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
        """Whether the next forward pass normalizes by the statistics of its input.

        Raises:
            RuntimeError: the layer should normalize by population statistics, but keeps none.
        """
        if self.running_mean is None:
            if self.statistics == "population":
                raise RuntimeError(
                    f"{type(self).__name__} is to normalize by population statistics, and keeps none "
                    "(track_running_stats=False): dn.set_statistics(model, 'auto'), or thaw it where it is frozen"
                )
            return True
        return self.training if self.statistics == "auto" else self.statistics == "minibatch"

    @property
    def population(self) -> Population | None:
        """The running statistics and how a training step updates them; None if it does not."""
        if self.running_mean is None or not self.track_running_stats:
            return None
        assert self.running_var is not None and self.num_batches_tracked is not None
        buffers = (self.running_mean, self.running_var, self.num_batches_tracked)
        return Population(*buffers, self.momentum, self.averages_deviation, self.eps, self.running_total_var)

    def reset_running_stats(self) -> None:
        """Reset the population statistics to mean 0, variance 1 and no steps; a frozen layer keeps its own."""
        if not self.frozen:
            self._reset_statistics()

    def reset_parameters(self) -> None:
        """Reset γ to 1, β to 0, and the population statistics, also in a frozen layer."""
        self._reset_statistics()
        for value, initial in ((self.weight, 1.0), (self.bias, 0.0)):
            if value is not None:
                nn.init.constant_(value, initial)

    def _reset_statistics(self) -> None:
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()
        if self.running_total_var is not None:
            self.running_total_var.fill_(1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for k, name in enumerate(self.domain_names or ()):
            # in the key, beside a tensor without elements: state dicts are averaged, and cast to other dtypes
            destination[f"{prefix}domain_names.{k}.{name}"] = torch.empty(0)

    def _load_names(self, state_dict: Any, prefix: str, errors: list[str]) -> None:
        """Names of the checkpoint become this layer's or, if it has its own, its rows are taken by name."""
        names = _saved_names(state_dict, f"{prefix}domain_names")
        if not names:
            return
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
        for name in ("running_mean", "running_var", "running_total_var", "num_batches_tracked", "weight", "bias"):
            value = state_dict.get(prefix + name)
            if value is not None and value.ndim == (1 if name == "num_batches_tracked" else 2):
                state_dict[prefix + name] = value[rows.to(value.device)]

    def _load_total_var(self, state_dict: Any, prefix: str) -> None:
        """A total variance that only the checkpoint has is kept; one that only this layer has is the variance there."""
        key = prefix + "running_total_var"
        if self.running_total_var is None:
            if key in state_dict and self.running_var is not None:
                self.running_total_var, self.track_total_var = torch.ones_like(self.running_var), True
        elif prefix + "running_var" in state_dict:
            state_dict.setdefault(key, state_dict[prefix + "running_var"].clone())  # its own memory, with assign=True

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Statistics and affine of one domain, `(C,)`, are repeated for each domain of `(K, C)`."""
        self._load_names(state_dict, prefix, errors)
        self._load_total_var(state_dict, prefix)
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


class AffineChoice(str):
    """`"shared"` or `"per_domain"`, the affine of a layer that computes something else than torch's BatchNorm.

    Its truth is what helpers ask for that would put a BatchNorm of torch, or a frozen one, in the layer's place.
    """

    __slots__ = ()

    def __bool__(self) -> bool:
        raise TypeError(
            "this layer cannot be replaced by a BatchNorm of torch, which computes something else. To synchronize "
            "BatchNorms: dn.convert_batchnorm(model, 'SyncBN'); to freeze them: dn.freeze_batchnorm(model); to ask "
            "whether there is an affine: layer.weight is not None"
        )


def one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    """ValueError if `value` is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} takes one of {list(choices)}, got {value!r}")


def _as_keywords(cls: type, args: Sequence[Any]) -> str:
    """The call that was meant, its arguments by name: torch's or, of a whole number, the layer's own."""
    own = list(inspect.signature(cls).parameters)[1:]
    names = own if isinstance(args[1], int) else _TORCHS_ARGUMENTS
    given = ", ".join(f"{name}={value!r}" for name, value in zip(names, args[1:], strict=False))
    return f"write {cls.__name__}({args[0]!r}, {given})"


def _saved_names(state_dict: Any, key: str) -> tuple[str, ...]:
    """The names of domains in a state dict, which are taken out of it."""
    if (text := state_dict.pop(key, None)) is not None:  # older checkpoints: their letters as numbers
        return tuple(bytes(text.tolist()).decode().split("\n"))
    found = sorted(
        (int(number), name, whole)
        for whole in state_dict
        if whole.startswith(key + ".")
        for number, name in [whole[len(key) + 1 :].split(".", 1)]
    )
    for _, _, whole in found:
        del state_dict[whole]
    return tuple(name for _, name, _ in found)
