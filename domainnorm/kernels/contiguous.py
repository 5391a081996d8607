"""On a CPU, where rows lie in one piece each: torch's batch-norm kernels, which take every row for a channel.

As a batch of one sample `(1, N · C, L)` they normalize, and reduce, row by row, vectorized and on all threads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PROBE = 16  # elements that tell about where a row lies: a cache line of float32
BLOCK = 1 << 17  # elements that stay in a core's cache


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `plain.moments`, in one pass over `x`: sums of what is left after a first guess at the mean.

    The guess is the mean of some of the row's own elements, of which it has `L / PROBE` times as many, so that
    `(mean - guess)² <= var · L / PROBE`: little can cancel in `Σ(x - guess)² / L - (mean - guess)²`.
    """
    rows = x.view(x.shape[0] * x.shape[1], -1)
    length = rows.shape[1]
    guess = rows[:, :PROBE].mean(1, keepdim=True)
    step = min(max(BLOCK * torch.get_num_threads() // length, 1), len(rows))
    block, zero = rows.new_empty(step, length), torch.zeros_like(guess)
    parts = []
    for some, near, none in zip(rows.split(step), guess.split(step), zero.split(step), strict=True):
        rest = torch.sub(some, near, out=block[: len(some)])
        parts.append(_sums(rest, rest, none))
    total, squares = (torch.cat(of) if len(of) > 1 else of[0] for of in zip(*parts, strict=True))
    beside = total / length
    var = (squares / length).addcmul_(beside, beside, value=-1).clamp_(min=0)
    return (guess.squeeze(1) + beside).view(x.shape[:2]), var.view(x.shape[:2])


def affine(x: Tensor, scale: Tensor, centre: Tensor, shift: Tensor) -> Tensor:
    """As `plain.affine`; where a row lies far from its `centre`'s zero it rounds as `nn.BatchNorm2d` does."""
    return _affine(x, scale, centre, shift)


def sums(grad: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """As `plain.sums`, in one pass."""
    rows = x.view(x.shape[0] * x.shape[1], -1)
    total, products = _sums(grad.reshape(rows.shape), rows, centre)
    return total.view(x.shape[:2]), products.view(x.shape[:2])


def gradient(
    grad: Tensor | None, x: Tensor, scale: Tensor | None, slope: Tensor, centre: Tensor, offset: Tensor
) -> Tensor:
    """As `plain.gradient`."""
    if grad is None or scale is None:
        return _affine(x, slope, centre, offset)
    out = _affine(grad.reshape(x.shape), scale, torch.zeros_like(scale), offset - slope * centre)
    out.view(slope.numel(), -1).addcmul_(x.view(slope.numel(), -1), slope.view(-1, 1))
    return out


def _affine(x: Tensor, scale: Tensor, centre: Tensor, shift: Tensor) -> Tensor:
    scale, shift, centre = (v.reshape(-1) for v in (scale, shift, centre))
    rows = x.view(1, len(scale), -1)
    return F.batch_norm(rows, centre, torch.ones_like(scale), scale, shift, False, 0.0, 0.0).view(x.shape)


def _sums(grad: Tensor, rows: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Σ grad, Σ grad · (x - centre) of rows `(R, L)`: the gradients of a bias and a weight."""
    centre = centre.reshape(-1)
    one = torch.ones_like(centre)
    _, products, total = torch.ops.aten.native_batch_norm_backward(
        grad.unsqueeze(0), rows.unsqueeze(0), one, None, None, centre, one, True, 0.0, [False, True, True]
    )
    return total, products
