"""What watches a model leaves it as it found it; what fails has changed nothing."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import domainnorm as dn
from domainnorm.statistics.preserve import preserve_state


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, []

    def forward(self, x):
        self.calls += 1
        self.seen.append(x.shape)
        return x


def net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), dn.DomainBatchNorm(4, num_domains=2), Counting(), *layers)


def snapshot(model):
    """All that a model is, by value and by identity."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inner = list(value.items()) if isinstance(value, dict) else list(value) if isinstance(value, list) else None
            found[name, key] = id(value), inner if not isinstance(value, torch.Tensor) else None
    found |= {name: (value.clone(), value.requires_grad) for name, value in model.state_dict(keep_vars=True).items()}
    return found


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        if isinstance(key, str):
            assert torch.equal(after[key][0], value[0]) and after[key][1] == value[1], key
        elif key[1] != "seen":
            assert str(after[key][1]) == str(value[1]), key
            assert after[key][0] == value[0], key


def x(seed=0):
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_everything_is_put_back():
    model = net(dn.BatchGroupNorm(4, num_groups=8), dn.BatchRenorm(4))
    model[0].weight.requires_grad_(False)
    handle = model[0].register_forward_hook(lambda *_: None)
    before = snapshot(model)
    for error in (None, KeyError):
        try:
            with preserve_state(model):
                dn.use_domain(model, 1)
                model.train()(x())
                dn.set_statistics(model, "minibatch").requires_grad_(True)
                model[1].batch_hook, model[3].anything = print, 1
                model[0].register_forward_pre_hook(lambda *_: None)
                model[0].register_buffer("more", torch.ones(1))
                handle_in_block = model[2].register_forward_hook(lambda *_: None)
                model[4] = nn.Identity()
                del model[1]._buffers["running_total_var"]
                if error:
                    raise error
        except KeyError:
            assert error
        assert_unchanged(model, before)
        handle_in_block.remove()  # knows its dict
    assert model[3].feature_size is None and model[2].seen  # a list of a user's own keeps what was appended
    handle.remove()
    assert not model[0]._forward_hooks


def test_only_on_error():
    model = net()
    with preserve_state(model, only_on_error=True):
        model[1].domain_names = ("a", "b")
    assert model[1].domain_names == ("a", "b")
    with pytest.raises(KeyError), preserve_state(model, only_on_error=True):
        model[1].domain_names = None
        raise KeyError
    assert model[1].domain_names == ("a", "b")


@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_a_recomputation_that_fails(method):
    model = net(dn.BatchGroupNorm(4, num_groups=8))
    dn.use_domain(model, 0)
    before = snapshot(model)
    with pytest.raises((RuntimeError, ValueError)):
        dn.recompute_population_statistics(model, [x(), torch.zeros(4, 5, 6, 6)], method=method, progress=False)
    assert_unchanged(model, before)
    dn.recompute_population_statistics(model, [x()], method=method, progress=False)
    assert model[3].feature_size == (6, 6)


def test_the_nearest_domain_within_a_virtual_batch():
    model = net().eval()
    features = model[0](x()).detach()
    model[1].running_mean[1], model[1].running_var[1] = features.mean((0, 2, 3)), features.var((0, 2, 3))
    seen = []

    def hook(layer, inputs):
        seen.append(inputs.tensors[0].shape[0])

    model[1].batch_hook = hook
    before = snapshot(model)
    assert dn.nearest_domain(model, x()) == 1
    assert_unchanged(model, before)
    model[1].batch_hook = None
    dn.use_domain(model, 0)
    far = x() * 50 + 100  # nearest to the other one
    with dn.virtual_batch(model, far):
        expected = model(x())
        inside = snapshot(model)
        assert dn.nearest_domain(model, x()) == 1
        assert_unchanged(model, inside)
        assert torch.equal(model(x()), expected)
    assert not seen


def refused():
    """Models that are refused at their last layer, and what refuses them."""

    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return x

    pruned = nn.BatchNorm2d(4)
    prune.l1_unstructured(pruned, "weight", 2)
    untracked = dn.SeqNorm(4, num_channel_groups=2, num_sample_groups=2, track_running_stats=False)
    yield "own", Own(4), lambda m: dn.convert_batchnorm(m, "BRN")
    yield "pruned", pruned, lambda m: dn.convert_batchnorm(m, "GhostBN", samples_per_group=2)
    yield "to torch", untracked, lambda m: dn.convert_batchnorm(m, "BatchNorm2d")
    yield "frozen", untracked, dn.freeze_batchnorm
    yield "pruned, frozen", pruned, dn.freeze_batchnorm
    yield "new domain", dn.DomainBatchNorm(3), lambda m: dn.add_domain(m, [x()], "night", progress=False)
    yield "kept", dn.DomainBatchNorm(4, num_domains=5), lambda m: dn.keep_domain(m, 3)
    yield "named", nn.Identity(), lambda m: dn.name_domains(m, ["a", "b", "c"])


@pytest.mark.parametrize(("last", "change"), [v[1:] for v in refused()], ids=[v[0] for v in refused()])
def test_what_is_refused_has_changed_nothing(last, change):
    model = net(nn.BatchNorm2d(4), last)
    model[0].weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        change(model)
    assert_unchanged(model, before)
