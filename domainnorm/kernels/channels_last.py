"""On a CPU, where the channels of a pixel lie side by side: a row is a channel of one sample."""

import torch
from torch import Tensor


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `plain.moments`, by torch's batch-norm kernel, which takes two passes over each sample."""
    parts = [torch.batch_norm_update_stats(sample, None, None, 0.0) for sample in x.split(1)]
    mean, var = (torch.stack(of) for of in zip(*parts, strict=True))
    return mean, var


def affine(x: Tensor, scale: Tensor, centre: Tensor, shift: Tensor) -> Tensor:
    """As `plain.affine`; where a row lies far from its `centre`'s zero it rounds as `nn.BatchNorm2d` does."""
    return torch.addcmul(_per_row(shift - scale * centre), x, _per_row(scale))


def sums(grad: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """As `plain.sums`, in one pass: the gradients of the bias and weight of a batch norm of each sample."""
    one = torch.ones_like(centre[0])
    grad = grad.contiguous(memory_format=torch.channels_last)
    parts = [
        torch.ops.aten.native_batch_norm_backward(g, s, one, None, None, c, one, True, 0.0, [False, True, True])
        for g, s, c in zip(grad.split(1), x.split(1), centre, strict=True)
    ]
    total, products = (torch.stack([of[k] for of in parts]) for k in (2, 1))
    return total, products


def gradient(
    grad: Tensor | None, x: Tensor, scale: Tensor | None, slope: Tensor, centre: Tensor, offset: Tensor
) -> Tensor:
    """As `plain.gradient`."""
    out = torch.addcmul(_per_row(offset - slope * centre), x, _per_row(slope))
    return out if grad is None or scale is None else out.addcmul_(grad, _per_row(scale))


def _per_row(value: Tensor) -> Tensor:
    return value[:, :, None, None]
