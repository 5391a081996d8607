"""Change the norm layers of a model: into other layers, and which statistics normalize."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import (
    LAYERS,
    BatchGroupNorm,
    BatchRenorm,
    DomainBatchNorm,
    FrozenBatchNorm,
    GroupedBatchNorm,
    get_norm,
    norm_name,
)
from ..layers.activation import has_activation, keep_activation
from ..layers.ghost import GhostBatchNorm
from ..layers.group_norm import GroupNorm
from ..ops.moments import Moments
from ..statistics.preserve import unchanged_on_error
from .replace import check_affine, replace_layers

_BatchNorm = nn.modules.batchnorm._BatchNorm
_TORCH = {kind.__name__: kind for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)}


def convert_batchnorm(model: nn.Module, name: str, **options: Any) -> nn.Module:
    """Replace every BatchNorm of `model`, torch's or this library's, by another norm.

    γ and β stay the same Parameters, so an optimizer keeps its state. The exception is `affine="per_domain"`, which
    gives each domain its own: create the optimizer afterwards. Population statistics, eps, momentum (except for
    `BatchRenorm`, which has its own), mode, device and dtype are kept, as are the dropout and activation that timm
    fuses into its `BatchNormAct2d`. A BGN piece of several channels gets their merged statistics, each part of a
    channel those of the channel. `SeqNorm` needs statistics of group-normalized features, so they are reset, to be
    trained or recomputed, unless its GhostBN comes first. Frozen layers stay; hooks that users registered on the old
    layers are lost.

    The way back: `"BatchNorm1d"`, `"BatchNorm2d"`, `"BatchNorm3d"` or `"SyncBatchNorm"` makes torch's layers of those
    that have one domain and whose inference is one affine per channel. This includes frozen layers, which follow
    `train()` again. Among torch's own layers, only those that are, or become, a SyncBatchNorm are replaced.

    Args:
        model: any module. If it is a norm layer itself, it is left untouched and the converted copy is returned.
        name: a class of this library, such as `"GhostBatchNorm"`; its name in a config, such as `"GhostBN"` (see
            `get_norm`, also for channels that a number of groups does not divide); or a class of torch.
        **options: of the new layer.

    Returns:
        The model.

    Raises:
        ValueError: unknown name, options that the layer refuses, a lazy layer that has seen no input yet, statistics
            that do not fit, or a pruned or parametrized γ or β; nothing was changed.
        TypeError: a subclass of BatchNorm with a forward pass of its own; nothing was changed.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
        >>> dn.convert_batchnorm(model, "GhostBatchNorm", samples_per_group=16)[1]
        GhostBatchNorm(16, affine='shared', eps=1e-05, momentum=0.1, samples_per_group=16)
        >>> type(dn.convert_batchnorm(model, "BatchNorm2d")[1]).__name__
        'BatchNorm2d'
    """
    return _exchange(model, lambda layer: _converted(layer, name, options))


def convert_groupnorm(model: nn.Module, **options: Any) -> nn.Module:
    """Replace every `nn.GroupNorm` of `model` by a `GroupedBatchNorm` with one sample per group.

    With `example_weight` 1, it computes the same function, but also gathers population statistics. With these, trained
    or recomputed, other example weights can be chosen (*Four Things*, §3.1, Fig. 2).

    Args:
        model: any module. If it is a GroupNorm itself, it is left untouched and the converted copy is returned.
        **options: of `DomainBatchNorm`, such as `num_domains`.

    Returns:
        The model.

    Raises:
        TypeError: a subclass of GroupNorm with a forward pass of its own; nothing was changed.
        ValueError: γ or β is pruned or parametrized; nothing was changed.

    Example::

        >>> model = dn.convert_groupnorm(nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16)))
        >>> type(model[1]).__name__, model[1].example_weight
        ('GroupedBatchNorm', 1.0)
    """

    def converted(layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, nn.GroupNorm):
            return None
        _check_kind(layer, (nn.GroupNorm, GroupNorm))
        check_affine(layer)
        given: dict[str, Any] = {"eps": layer.eps, "affine": "shared" if layer.affine else None}
        if layer.affine:
            given |= {"device": layer.weight.device, "dtype": layer.weight.dtype}
        new = GroupedBatchNorm(
            layer.num_channels, num_channel_groups=layer.num_groups, samples_per_group=1, **given | options
        )
        new.example_weight = 1.0
        return new

    return _exchange(model, converted)


@unchanged_on_error
def _exchange(model: nn.Module, converted: Any) -> nn.Module:
    """Put `converted(layer)` in the place of each layer for which it is not None; all of them, or none."""
    layers = dict(model.named_modules())
    new: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        try:
            made = converted(layer)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name or 'the model'}: {error}") from error
        if made is not None:
            new[layer] = made
    for layer, made in new.items():
        _take_over(made, layer, copy=layer is model)
    return replace_layers(model, lambda name, module: new.get(module, module))


def _converted(layer: nn.Module, name: str, options: dict[str, Any]) -> nn.Module | None:
    """The layer `name` with the hyperparameters and statistics of `layer`; None if that is no BatchNorm to convert."""
    if not isinstance(layer, _BatchNorm) or _stays(layer, name):
        return None
    _check_kind(layer, tuple(_TORCH.values()))
    check_affine(layer)
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        raise ValueError("a lazy BatchNorm does not know its channels yet: run the model once before converting it")
    if name in _TORCH:
        return _torch_layer(layer, _TORCH[name], options)
    name = norm_name(name)
    kind: Any = LAYERS[name]
    given: dict[str, Any] = {"eps": layer.eps}
    if isinstance(layer, DomainBatchNorm):
        keys = ("num_domains", "sgd_statistics", "population_statistics", "affine")
        given |= {key: getattr(layer, key) for key in keys}
    else:
        given["affine"] = "shared" if layer.affine else None
    given |= _factory(layer)
    if layer.weight is not None and layer.bias is None:
        given["bias"] = False
    if layer.running_mean is None:
        given["track_running_stats"] = False
    if kind is not BatchRenorm:
        given["momentum"] = layer.momentum
    if (
        not issubclass(kind, (nn.GroupNorm, GhostBatchNorm))
        and not {"samples_per_group", "group_size"} & options.keys()
        and name != "SyncBN"
    ):
        given["sync"] = (
            (layer.process_group or True)
            if isinstance(layer, nn.SyncBatchNorm)
            else (layer.sync if isinstance(layer, DomainBatchNorm) else False)
        )
    new = get_norm(name, layer.num_features, **given | options)
    assert new is not None
    for key in ("weight", "bias"):
        old, own = getattr(layer, key), getattr(new, key)
        if old is not None and own is not None and old.shape not in (own.shape, own.shape[1:]):
            raise ValueError(f"{key} of {len(old)} domains cannot be kept in one: choose affine='per_domain'")
    if isinstance(new, DomainBatchNorm):
        of_groups = [getattr(norm, "channels_per_first_group", 0) > 0 for norm in (layer, new)]
        if layer.running_mean is not None and of_groups[0] == of_groups[1]:
            _keep_statistics(new, layer)
        if layer.running_mean is not None:
            new.track_running_stats = layer.track_running_stats
        if isinstance(layer, DomainBatchNorm):
            new.statistics, new.example_weight = layer.statistics, layer.example_weight
            new.copy_domain_config(layer)
    return new


def _stays(layer: nn.Module, name: str) -> bool:
    """Whether it is frozen or, on the way back, torch's and not a SyncBatchNorm."""
    if name in _TORCH:
        return not isinstance(layer, (DomainBatchNorm, nn.SyncBatchNorm)) and name != "SyncBatchNorm"
    return getattr(layer, "frozen", False)


def _torch_layer(layer: Any, kind: Any, options: dict[str, Any]) -> nn.Module:
    """Torch's layer `kind` with the hyperparameters and statistics of `layer`."""
    ours = isinstance(layer, DomainBatchNorm)
    given: dict[str, Any] = {"eps": layer.eps, "momentum": layer.momentum, "affine": layer.weight is not None}
    given |= {"track_running_stats": layer.running_mean is not None} | _factory(layer)
    if layer.weight is not None and layer.bias is None:
        given["bias"] = False  # from torch 2.15 on
    given |= options
    if ours:
        _check_is_torchs(layer, given["track_running_stats"])
    if kind is nn.SyncBatchNorm:
        group = layer.sync if ours else getattr(layer, "process_group", None)
        given.setdefault("process_group", None if isinstance(group, bool) else group)
    new = kind(layer.num_features, **given)
    if new.track_running_stats:
        for key, value in layer.named_buffers(recurse=False):
            if key in new._buffers:
                setattr(new, key, value.clone())
        new.track_running_stats = layer.track_running_stats
    return new


def _check_is_torchs(layer: DomainBatchNorm, tracks: bool) -> None:
    """ValueError if torch's BatchNorms, which may track running statistics, infer otherwise."""
    if not layer.is_channel_affine:
        raise ValueError(f"{type(layer).__name__} is no affine of each channel in inference, as torch's layers are")
    if layer.num_domains > 1:
        raise ValueError(
            f"torch's layers have one domain, this one {layer.num_domains}: dn.merge_domains(model) makes one of those "
            "that dn.use_domain chooses from"
        )
    if layer.statistics == "minibatch" and tracks:
        raise ValueError(
            "minibatch statistics in inference are torch's track_running_stats=False: pass that, or call "
            "dn.set_statistics(model, 'auto') before"
        )
    if layer.example_weight:
        raise ValueError(
            f"torch's layers have no example_weight, this one {layer.example_weight}: dn.set_example_weight(model, 0)"
        )


def _factory(layer: Any) -> dict[str, Any]:
    known = next((v for v in (layer.weight, layer.running_mean) if v is not None), None)
    return {} if known is None else {"device": known.device, "dtype": known.dtype}


def _check_kind(layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """TypeError if a subclass of torch's layers does more than they do, but for timm's fused dropout and activation."""
    own = type(layer).forward in {kind.forward for kind in kinds} or type(layer).__module__ == "timm.layers.norm"
    if not own and not isinstance(layer, DomainBatchNorm) and not has_activation(layer):
        raise TypeError(f"{type(layer).__name__} has a forward pass of its own, which would be lost")


def _keep_statistics(new: DomainBatchNorm, layer: Any) -> None:
    mean = layer.running_mean
    assert new.running_mean is not None and new.running_var is not None
    if mean.ndim > new.running_mean.ndim or (mean.ndim == 2 and len(mean) != len(new.running_mean)):
        raise ValueError(
            f"statistics of {len(mean)} domains cannot be kept for {new.num_domains} "
            f"({new.population_statistics}): choose num_domains={len(mean)}, population_statistics='per_domain'"
        )
    width = new.running_mean.shape[-1]
    parts = width // math.gcd(mean.shape[-1], width)  # of a channel: those of a piece are neighbors
    state: dict[str, Tensor] = {}
    for key in ("running_var", "running_total_var"):
        if (var := getattr(layer, key, None)) is not None:
            kept = Moments(torch.ones_like(mean[..., :1]), mean, var).repeat_channels(parts).merge_channels(width)
            state |= {"running_mean": kept.mean, key: kept.var}
    for key, buffer in dict(new.named_buffers(recurse=False)).items():
        if buffer.is_floating_point():
            setattr(new, key, buffer.to(mean.dtype))
    if layer.num_batches_tracked is not None:
        state["num_batches_tracked"] = layer.num_batches_tracked
    new.load_state_dict(state, strict=False)
    if isinstance(layer, BatchGroupNorm) and isinstance(new, BatchGroupNorm) and layer.num_groups == new.num_groups:
        new.feature_size = layer.feature_size


def _take_over(new: nn.Module, layer: nn.Module, copy: bool) -> None:
    """Parameters, mode, and what is fused into the layer."""
    for name in ("weight", "bias"):
        old, own = getattr(layer, name), getattr(new, name)
        if old is None or own is None:
            new.register_parameter(name, None)
            continue
        learns = own.requires_grad if isinstance(new, FrozenBatchNorm) else old.requires_grad
        if copy or own.shape != old.shape:
            own.data.copy_(old.data)  # of one domain, for each
        else:
            setattr(new, name, old)
        getattr(new, name).requires_grad_(learns)
    new.train(layer.training)
    keep_activation(new, layer)
