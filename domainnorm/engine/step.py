"""Parts of a step of training: the model over the processes, its losses, numbers that must be finite."""

import contextlib
import math
from collections.abc import Generator
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.sampler import images_per_forward
from ..distributed import rank, to_device, world_size
from ..errors import UserError, quote
from ..layers import DomainBatchNorm
from ..statistics.virtual_batch import virtual_batch
from .try_smallest import ONE_VALUE, REMEDY


def distributed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, wrapped where there are several processes."""
    if world_size() == 1:
        return model
    network = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    network.broadcast_buffers = False  # here, because torch 2.13 renamed the argument
    return network


def first_backward(cfg: CfgNode, network: nn.Module, device: torch.device, loader: Generator[Any, None, None]) -> None:
    """One that counts for nothing. DDP sums gradients in another order after its first one, as the stopped run did."""
    with contextlib.closing(loader) as batches:
        images, targets = to_device(next(batches), device)
    size, amp = images_per_forward(cfg, world_size()), cfg.SOLVER.AMP
    with torch.autocast(device.type, dtype=getattr(torch, amp.DTYPE), enabled=amp.ENABLED):
        losses = losses_of(cfg, network, images[:size], targets[:size])
    torch.stack(list(losses.values())).sum().backward()
    network.zero_grad()


def losses_of(
    cfg: CfgNode, network: nn.Module, images: list[Tensor], targets: list[dict[str, Any]]
) -> dict[str, Tensor]:
    """The losses of one forward pass. The last `SOLVER.VIRTUAL_BATCH` images only count in the statistics."""
    own = len(images) - cfg.SOLVER.VIRTUAL_BATCH
    model = network.module if isinstance(network, DistributedDataParallel) else network
    follow_batches = any(isinstance(m, DomainBatchNorm) and not m.frozen for m in model.modules())
    virtual = own < len(images) and follow_batches
    with virtual_batch(model, images[own:], targets[own:]) if virtual else contextlib.nullcontext():
        try:
            losses: dict[str, Tensor] = network(images[:own], targets[:own])
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            raise UserError(f"the features of a batch are too small: {error}; here: {REMEDY}") from error
    if not isinstance(losses, dict) or not losses or not all(isinstance(loss, Tensor) for loss in losses.values()):
        raise UserError(
            f"the {type(model).__name__} returned {quote(losses)} in training: expected a dict of losses, each a tensor"
        )
    return losses


def only_here(network: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Gradients of this block stay on this rank; the next ones carry them along to the others."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()


def check_finite(
    what: str, tensors: dict[str, Tensor], iteration: int, targets: list[dict[str, Any]]
) -> dict[str, float]:
    """Numbers of the loss, gradient or model, in one copy from the device; refused before they do harm."""
    values = dict(zip(tensors, torch.stack([v.detach().float() for v in tensors.values()]).tolist(), strict=True))
    if all(math.isfinite(value) for value in values.values()):
        return values
    shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
    files = ", ".join(str(target.get("file_name", target.get("image_id"))) for target in targets)
    raise UserError(
        f"the {what} is not finite at iteration {iteration + 1}: {shown}; images of rank {rank()}: {files}; "
        "lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or enable SOLVER.CLIP_GRADIENTS"
    )
