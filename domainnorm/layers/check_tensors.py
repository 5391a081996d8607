"""Inputs, parameters and buffers that do not fit a layer: refused as torch refuses them, before C++ reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..autograd import sees_operations
from .base import PopulationStatistics


def check_tensors(layer: PopulationStatistics, inputs: Sequence[Tensor]) -> None:
    """Refuse parameters and buffers that do not fit a layer and its inputs.

    Raises:
        RuntimeError: as torch, another shape, device or dtype, or memory that is freed.
    """
    x = inputs[0]
    domains = (layer.num_domains,) if layer.num_domains > 1 else ()
    statistics_shape = domains if layer.population_statistics == "per_domain" else ()
    shapes = {
        "weight": (*domains, layer.num_features) if layer._affine == "per_domain" else (layer.num_features,),
        "running_mean": (*statistics_shape, layer._num_statistics),
        "num_batches_tracked": statistics_shape,
    }
    shapes["bias"] = shapes["weight"]
    shapes["running_var"] = shapes["running_total_var"] = shapes["running_mean"]
    device, dtype = x.device, x.dtype
    tensors = {name: v for name, v in (*layer._parameters.items(), *layer._buffers.items()) if v is not None}
    for name, value in tensors.items():
        if (shape := shapes.get(name)) is not None:
            fits = value.dtype == dtype or name == "num_batches_tracked"
            if value.shape != shape or value.device != device or not fits or value.layout != torch.strided:
                _refuse(layer, x, name, value, shape)
    if sees_operations():
        return
    for value in (*inputs, *tensors.values()):
        has_memory = type(value) in (Tensor, nn.Parameter)  # not every subclass has memory of its own
        if has_memory and value.numel() and not value.untyped_storage().nbytes():
            raise RuntimeError(
                f"{type(layer).__name__}: the memory of an input, parameter or buffer is freed, as FSDP and offloading "
                "do: its data is not allocated yet"
            )


def _refuse(layer: PopulationStatistics, x: Tensor, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Unless it is float32 beside a half-precision input, or the number of steps."""
    what = f"{type(layer).__name__}: expected {name}"
    if value.shape != shape:
        raise RuntimeError(f"{what} of shape {shape}, got {tuple(value.shape)}")
    if value.device != x.device:
        raise RuntimeError(f"{what} and the input on the same device, got {value.device} and {x.device}")
    half = x.dtype in (torch.float16, torch.bfloat16)
    dtypes = (x.dtype, torch.float32) if half else (x.dtype,)  # as torch's kernels on all devices together
    if name != "num_batches_tracked" and (value.dtype not in dtypes or value.layout != torch.strided):
        raise RuntimeError(
            f"{what}, for an input of {x.dtype}, as dense {' or '.join(map(str, dtypes))}, got {value.dtype}, "
            f"{value.layout}"
        )
