"""The focal loss in few passes against torchvision's."""

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from domainnorm.modeling.focal_loss import focal_loss


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (-1, 0.0), (0.4, 1.5), (0.0, 3.0)])
@pytest.mark.parametrize("number", [40, 0])
def test_value_and_gradient_are_torchvisions(alpha, gamma, number):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(number, 5, generator=generator, dtype=torch.float64) * 5).requires_grad_()
    decided = torch.rand(number, generator=generator) > 0.2
    foreground = decided & (torch.rand(number, generator=generator) > 0.6)
    classes = torch.randint(0, 5, (number,), generator=generator)
    targets = torch.zeros_like(logits)
    targets[foreground, classes[foreground]] = 1
    expected = sigmoid_focal_loss(logits[decided], targets[decided], alpha, gamma, reduction="sum")
    got = focal_loss(logits, decided, foreground, classes, alpha, gamma)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss * 3, logits)[0] for loss in (got, expected)), rtol=1e-10, atol=1e-12
    )


def test_a_second_derivative_is_not_silently_missing():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = focal_loss(logits, torch.tensor([True, True]), torch.tensor([False, True]), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="double backward is not implemented for the focal loss"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_float32_of_extreme_logits():
    logits = torch.tensor([[-200.0, 200.0], [100.0, -100.0], [0.0, 50.0]]).requires_grad_()
    loss = focal_loss(
        logits, torch.tensor([True, True, False]), torch.tensor([True, False, False]), torch.tensor([1, 0, 0])
    )
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss == 75 and grad.isfinite().all() and (grad[2] == 0).all()
