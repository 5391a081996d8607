"""The focal loss of anchors of which few have a class, in few passes over their logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def focal_loss(
    logits: Tensor, decided: Tensor, foreground: Tensor, classes: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """The sum of torchvision's `sigmoid_focal_loss` over the decided anchors.

    No tensor of targets, no copy of the logits of decided anchors: all are first taken for background, and one tensor
    is kept for the backward pass, the gradient. A GPU waits for nothing. It has no second derivative.

    Args:
        logits: `(A, K)`.
        decided: bool `(A,)`, the anchors that count.
        foreground: bool `(A,)`, those with a class, all decided.
        classes: LongTensor `(A,)`, of those; of the others any in [0, K).
        alpha: weight of an anchor's class against the others; -1: all weigh 1.
        gamma: how much less well-classified anchors weigh.
    """
    return _FocalLoss.apply(logits, decided, foreground[:, None], classes[:, None], alpha, gamma)


class _FocalLoss(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, decided: Tensor, foreground: Tensor, classes: Tensor, alpha: float, gamma: float
    ) -> Tensor:
        of_class, of_others = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
        loss, grad = _cost(logits, gamma)
        loss, grad = loss.mul_(of_others), grad.mul_(decided[:, None].to(grad) * of_others)
        own_loss, own_grad = _cost(-logits.gather(1, classes), gamma)
        for all_of, own in ((loss, own_loss * of_class), (grad, own_grad * -of_class)):
            all_of.scatter_(1, classes, torch.where(foreground, own, all_of.gather(1, classes)))
        ctx.save_for_backward(grad)
        return loss.sum(1).mul_(decided).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: once_differentiable lets a constant `grad` pass
            raise RuntimeError("double backward is not implemented for the focal loss")
        (own,) = ctx.saved_tensors
        return own * grad, None, None, None, None, None


def _cost(x: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """`p^gamma · softplus(x)` with `p = sigmoid(x)`, what a logit costs that should be low, and its derivative."""
    p = x.sigmoid()
    cost = F.softplus(x, threshold=40)  # from where on it is x in float64, too
    grad = torch.addcmul(cost, p, cost, value=-1).mul_(gamma).add_(p)
    modulation = p.pow_(gamma)
    return cost.mul_(modulation), grad.mul_(modulation)
