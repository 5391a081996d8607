"""Training steps that make a GPU wait for nothing.

On the meta device nothing has a value: what would copy one to the processor raises. An operation that brings a tensor
from there shows by its devices.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import domainnorm as dn
from domainnorm.modeling.retinanet import RetinaNetHead

LAYERS = {
    "BN": lambda: dn.DomainBatchNorm(16),
    "cumulative": lambda: dn.DomainBatchNorm(16, num_domains=3, momentum=None),
    "shared": lambda: dn.DomainBatchNorm(16, num_domains=3, sgd_statistics="shared", population_statistics="shared"),
    "per domain": lambda: dn.DomainBatchNorm(16, num_domains=3, affine="per_domain"),
    "shared, per domain": lambda: dn.DomainBatchNorm(
        16, num_domains=3, sgd_statistics="shared", population_statistics="per_domain"
    ),
    "GhostBN": lambda: dn.GhostBatchNorm(16, samples_per_group=2),
    "SeqNorm": lambda: dn.SeqNorm(16, num_channel_groups=4, num_sample_groups=2),
    "BGN": lambda: dn.BatchGroupNorm(16, num_groups=4),
    "GBGN": lambda: dn.GroupedBatchNorm(16, num_channel_groups=4, samples_per_group=2),
    "BRN": lambda: dn.BatchRenorm(16, r_max=[(5, 1), (9, 3)], d_max=[(5, 0), (9, 5)]),
    "BRN of domains": lambda: dn.BatchRenorm(16, num_domains=3),
}


class Of(torch.nn.Module):
    """A layer, or none, in a function of it and an input."""

    def __init__(self, function, layer=None):
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x):
        return self.function(self.layer, x)


class OneDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {v.device.type for v in tree_leaves((args, kwargs, result)) if isinstance(v, torch.Tensor)}
        assert len(devices) <= 1, f"{func} has tensors of {devices}"
        return result


class NothingCopied(TorchFunctionMode):
    """No tensor is made of numbers that the processor has: a GPU would copy them, which nothing shows on meta."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            assert result.device.type == "cpu", f"{func} copies {args} to {result.device}"
        return result


def step(module, inputs):
    with OneDevice(), NothingCopied():
        outputs = tree_leaves(module(inputs))
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_waits_for_nothing(name):
    layer = LAYERS[name]().to("meta")
    xs = [torch.empty(4, 16, 5 + k, 6, device="meta", requires_grad=True) for k in range(layer.num_domains)]
    step(layer, xs)
    step(layer, xs[0] if len(xs) == 1 else xs)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("name", LAYERS)
def test_inference_waits_for_nothing(name, alpha):
    layer = LAYERS[name]().to("meta").eval()
    dn.set_example_weight(layer, alpha)
    xs = [torch.empty(4, 16, 5 + k, 6, device="meta") for k in range(layer.num_domains)]
    with torch.no_grad(), OneDevice(), NothingCopied():
        layer(xs)


def test_samples_of_several_domains_wait_for_nothing():
    layer = dn.DomainBatchNorm(16, num_domains=3).to("meta")
    domains = torch.empty(4, dtype=torch.long, device="meta")
    step(Of(lambda layer, x: layer(x, domains), layer), torch.empty(4, 16, 5, 6, device="meta", requires_grad=True))


@pytest.mark.parametrize("rows", [("shared", "shared"), ("per_domain", "shared"), ("per_domain", "per_domain")])
def test_a_step_of_retinanets_head_waits_for_nothing(rows):
    sgd, population = rows
    head = RetinaNetHead(16, 3, 4, norm="BN", sgd_statistics=sgd, population_statistics=population).to("meta")
    levels = [torch.empty(2, 16, 2**k, 2**k, device="meta", requires_grad=True) for k in range(5, 0, -1)]
    step(head, levels)


def test_the_losses_of_retinanets_head_wait_for_nothing():
    head = RetinaNetHead(16, 3, 4, norm="BN").to("meta")
    levels = [torch.empty(2, 16, 2**k, 2**k, device="meta", requires_grad=True) for k in range(5, 0, -1)]
    anchors = 3 * sum(x.shape[2] * x.shape[3] for x in levels)

    def losses(head, levels):
        targets = [
            {"boxes": torch.empty(n, 4, device="meta"), "labels": torch.empty(n, dtype=torch.long, device="meta")}
            for n in (3, 0)
        ]
        places, matched = torch.empty(anchors, 4, device="meta"), torch.empty(anchors, dtype=torch.long, device="meta")
        return head.compute_loss(targets, head(levels), [places] * 2, [matched] * 2)

    step(Of(losses, head), levels)


def test_these_tests_see_what_would_wait():
    for how in (
        lambda _, x: x * x.mean().item(),
        lambda _, x: x * torch.ones(1),
        lambda _, x: x[x > 0],
        lambda _, x: x * x.new_tensor([2.0]),
    ):
        with pytest.raises((RuntimeError, AssertionError, NotImplementedError)):
            step(Of(how), torch.empty(3, device="meta", requires_grad=True))
