"""Extra samples count in the statistics and in nothing else; buffers are updated once a forward."""

import copy

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import domainnorm as dn
from domainnorm.statistics.lockstep import OutOfStepError


def make_model(sync=False):
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 3, 3), dn.DomainBatchNorm(3, sync=sync), nn.Tanh(), nn.Conv2d(3, 3, 3)]
    return nn.Sequential(*layers, dn.DomainBatchNorm(3, sync=sync)).double()


@pytest.fixture
def x():
    return torch.randn(2, 2, 8, 8, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def extra():
    return 2 * torch.randn(3, 2, 8, 8, dtype=torch.float64) + 1


@pytest.mark.parametrize("training", [True, False])
def test_equals_one_batch_of_both(x, extra, training):
    model, other = make_model().train(training), make_model().train(training)
    with dn.virtual_batch(model, extra):
        y = model(x)
    expected = dn.set_statistics(other, "minibatch")(torch.cat([x, extra]))[:2]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(list(model.buffers()), list(other.buffers()), rtol=1e-12, atol=1e-12)
    assert training == (int(model[1].num_batches_tracked) == 1)


def test_no_gradient_flows_through_the_extra_samples(x, extra):
    model, other = make_model(), make_model()
    extra.requires_grad_()
    with dn.virtual_batch(model, extra):
        y = model(x)
    y.pow(3).sum().backward()
    assert extra.grad is None
    # the same by hand: constants from the extra samples, at every layer
    a, b = other[0](x), other[0](extra).detach()
    for i, layer in ((1, other[1]), (4, other[4])):
        both = torch.cat([a, b.detach()])
        mean, var = both.mean((0, 2, 3), keepdim=True), both.var((0, 2, 3), correction=0, keepdim=True)
        a, b = ((v - mean) / (var + layer.eps).sqrt() for v in (a, b))
        if i == 1:
            a, b = other[3](a.tanh()), other[3](b.tanh()).detach()
    own = x.grad.clone()
    x.grad = None
    a.pow(3).sum().backward()
    torch.testing.assert_close(own, x.grad, rtol=1e-10, atol=1e-12)


def test_the_model_is_left_as_it_was(x, extra):
    model = make_model().eval()
    before = copy.deepcopy(model.state_dict())
    for broken in (False, True):
        try:
            with dn.virtual_batch(model, extra):
                assert model(x[:1]).shape == (1, 3, 4, 4)
                if broken:
                    model(torch.zeros(1, 5, 8, 8))
        except RuntimeError:
            assert broken
        assert "forward" not in vars(model) and [model[i].statistics for i in (1, 4)] == ["auto"] * 2
        assert model[1].batch_hook is None and not model.training
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = dn.DomainBatchNorm(2)

    def forward(self, x):
        return self.norm(x) if len(x) == 2 else x


def test_mistakes(x, extra):
    with pytest.raises(TypeError, match="torch's BatchNorm2d"), dn.virtual_batch(nn.BatchNorm2d(2), extra):
        pass
    with pytest.raises(ValueError, match="no DomainBatchNorm"), dn.virtual_batch(nn.ReLU(), extra):
        pass
    with pytest.raises(ValueError, match="no DomainBatchNorm"), dn.virtual_batch(dn.FrozenBatchNorm(2), extra):
        pass
    model = Branching()
    with (
        pytest.raises(OutOfStepError, match="forward 0 is finished, forward 1 at norm"),
        dn.virtual_batch(model, extra),
    ):
        model(x.float())


def synchronized(rank):
    model = make_model(sync=True)
    torch.manual_seed(0)
    x, extra = torch.randn(4, 2, 8, 8, dtype=torch.float64), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    with dn.virtual_batch(model, extra[rank:][:1] if rank else extra[[0, 2]]):
        y = model(x[2 * rank : 2 * rank + 2])
    expected = make_model()(torch.cat([x, extra]))[2 * rank : 2 * rank + 2]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_synchronized_layers_merge_the_extra_samples_of_all_ranks():
    run_ranks(synchronized, 2)


# activation checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_updates_no_buffer(x, reentrant):
    model, plain = make_model(), make_model()
    y = checkpoint(model, x, use_reentrant=reentrant)
    y.pow(2).sum().backward()
    plain(x.detach().requires_grad_()).pow(2).sum().backward()
    torch.testing.assert_close(list(model.buffers()), list(plain.buffers()), rtol=0, atol=0)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)
    model(x)
    assert int(model[1].num_batches_tracked) == 2
