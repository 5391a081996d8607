"""Domains of whole models: which one is in use, their names, new ones, and what is done without one."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import domainnorm as dn
from domainnorm.modeling import RetinaNetHead


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def net(num_domains=2, **options):
    """Two convolutions; nothing in it passes a domain on."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)]
    model = nn.Sequential(*layers).double()
    return dn.convert_batchnorm(model, "DomainBatchNorm", num_domains=num_domains, **options)


def images(count=6, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, 3, 9, 9, generator=generator, dtype=torch.float64)


def head(num_datasets=1, domains="level", **options):
    torch.manual_seed(0)
    options = {"num_levels": 3, "num_convs": 2, "norm": "BN", "norm_domains": domains} | options
    return RetinaNetHead(8, 2, 3, num_datasets=num_datasets, **options).double()


def levels(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 8, 8 >> k, 8 >> k, generator=generator, dtype=torch.float64) for k in range(3)]


def test_two_data_sets_as_domains_are_two_separate_batch_norms():
    model = net()
    separate = [net(1), net(1)]
    for step in range(3):
        for k, twin in enumerate(separate):
            x = images(seed=10 * step + k, scale=1 + k)
            with dn.use_domain(model, k):
                close(model(x), twin(x))
    for k, twin in enumerate(separate):
        with dn.use_domain(model.eval(), k):
            close(model(images()), twin.eval()(images()))
    assert model[1].current_domain is None


def test_a_mixed_batch_is_its_separated_batches():
    mixed, separated = net(), net()
    ids = torch.tensor([0, 1, 1, 0, 1, 0])
    x = images()
    y = torch.empty(6, 4, 5, 5, dtype=torch.float64)
    for k in range(2):
        with dn.use_domain(separated, k):
            y[ids == k] = separated(x[ids == k])
    with dn.use_domain(mixed, ids):
        close(mixed(x), y)
    for (name, a), b in zip(mixed.named_buffers(), separated.buffers(), strict=True):
        assert torch.equal(a, b) or torch.allclose(a, b, atol=1e-10), name


def test_use_domain_stays_until_it_is_changed_and_a_block_puts_it_back():
    model = net()
    dn.use_domain(model, 1)
    assert model[1].current_domain == 1
    with dn.use_domain(model, 0):
        assert model[4].current_domain == 0
    assert model[1].current_domain == model[4].current_domain == 1
    with pytest.raises(KeyError), dn.use_domain(model, 0):
        raise KeyError
    assert model[1].current_domain == 1
    dn.use_domain(model, None)
    with pytest.raises(ValueError, match="no domain"):
        model(images())


def test_a_list_and_a_said_domain_go_before_the_one_in_use():
    layer = dn.DomainBatchNorm(3, num_domains=2).double().train()
    x, twin = images(), copy.deepcopy(layer)
    with dn.use_domain(layer, 1):
        close(layer(x, domain=0), twin(x, domain=0))
        close(layer([x, x])[1], twin([x, x])[1])


@pytest.mark.parametrize(
    ("domain", "message"), [(2, "domains are 0 to 1, got 2"), (-1, "got -1"), ("dark", "without names")]
)
def test_wrong_domains_change_nothing(domain, message):
    model = net()
    dn.use_domain(model, 1)
    with pytest.raises(ValueError, match=message):
        dn.use_domain(model, domain)
    assert model[1].current_domain == 1


def test_a_model_of_one_domain_has_none_to_use():
    with pytest.raises(ValueError, match="no norm with several domains"):
        dn.use_domain(net(1), 0)


def test_names_are_used_and_saved():
    model = dn.name_domains(net(), ["day", "night"])
    with dn.use_domain(model, "night"):
        model(images(seed=3))
    assert model[1].num_batches_tracked.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"\['day', 'night'\], got 'dawn'"):
        dn.use_domain(model, "dawn")
    twin = net()
    twin.load_state_dict(model.state_dict())
    assert twin[4].domain_names == ("day", "night")
    assert pickle.loads(pickle.dumps(model))[4].domain_names == copy.deepcopy(model)[4].domain_names == ("day", "night")
    for names in (["a"], ["a", "a"], ["a", "b", "c"], ["a", ""], []):
        with pytest.raises(ValueError, match="expected"):
            dn.name_domains(model, names)


def test_statistics_load_by_name():
    model = dn.name_domains(net(3, affine="per_domain"), ["day", "night", "xray"])
    for k in range(3):
        with dn.use_domain(model, k):
            model(images(seed=k, scale=k + 1))
    other = dn.name_domains(net(affine="per_domain"), ["xray", "day"])
    other.load_state_dict(model.state_dict())
    for name in ("xray", "day"):
        with dn.use_domain(model.eval(), name), dn.use_domain(other.eval(), name):
            close(model(images()), other(images()))
    assert other[1].domain_names == ("xray", "day")
    third = dn.name_domains(net(affine="per_domain"), ["day", "dusk"])
    with pytest.raises(RuntimeError, match="'dusk' has no statistics"):
        third.load_state_dict(model.state_dict())


def test_checkpoints_without_names_load():
    model = dn.name_domains(net(), ["day", "night"])
    model.load_state_dict(net().state_dict())
    assert model[1].domain_names == ("day", "night")
    model.load_state_dict(net(1).state_dict())  # of one domain, for each


def test_activation_checkpointing_meets_its_domain_or_raises():
    model, twin = net(), net()
    for step in range(4):
        dn.use_domain(model, step % 2)
        dn.use_domain(twin, step % 2)
        a, b = (images(seed=step).requires_grad_() for _ in range(2))
        checkpoint(model, a, use_reentrant=False).square().sum().backward()
        twin(b).square().sum().backward()
        close(a.grad, b.grad)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)
    losses = []
    for k in range(2):
        dn.use_domain(model, k)
        losses.append(checkpoint(model, images(seed=k).requires_grad_(), use_reentrant=False).square().sum())
    with pytest.raises(RuntimeError, match="after use_domain changed its domain"):
        sum(losses).backward()


def test_a_list_of_tensors_with_a_domain_each():
    layer = dn.DomainBatchNorm(3, num_domains=4).double()
    twin = copy.deepcopy(layer)
    ids = torch.tensor([0, 3, 3, 0])
    x, y, z = images(4, 1), images(2, 2), images(3, 3)
    got = layer([x, y, z], domain=[ids, 1, torch.tensor([3, 0, 1])])
    together = twin(torch.cat([x, y, z]), domain=torch.tensor([0, 3, 3, 0, 1, 1, 3, 0, 1]))
    close(torch.cat(got), together)
    close(layer.running_var, twin.running_var)
    with pytest.raises(ValueError, match="a list of 2 domains"):
        layer([x, y], domain=[0])
    with pytest.raises(ValueError, match="a list of 2 tensors has one tensor per domain"):
        layer([x, y], domain=1)


@pytest.mark.parametrize("kind", ["GhostBatchNorm", "BatchRenorm", "SeqNorm"])
def test_lists_with_domains_in_other_norms(kind):
    options = {
        "GhostBatchNorm": {"samples_per_group": 2},
        "SeqNorm": {"num_channel_groups": 1, "num_sample_groups": 2},
    }.get(kind, {})
    layer = getattr(dn, kind)(3, num_domains=2, **options, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    x, y = images(4, 1), images(4, 2)
    ids = torch.tensor([0, 1, 0, 1])
    got = layer([x, y], domain=[ids, 1 - ids])
    close(torch.cat(got), twin(torch.cat([x, y]), domain=torch.cat([ids, 1 - ids])))


def test_heads_for_levels_and_data_sets_are_separate_heads():
    both = head(2, "level_and_dataset")
    single = [head(), head()]
    for k, twin in enumerate(single):
        features = levels(seed=k)
        with dn.use_domain(both, k):
            got = both(features)
        for key, value in twin(features).items():
            close(got[key], value)
    mixed = head(2, "level_and_dataset")
    features = [torch.cat(pair) for pair in zip(levels(seed=0), levels(seed=1), strict=True)]
    with dn.use_domain(mixed, torch.tensor([0, 0, 1, 1])):
        mixed(features)
    norm = both.classification_head.conv[0][1]
    close(mixed.classification_head.conv[0][1].running_var, norm.running_var)
    assert norm.running_mean.shape == (6, 8)


def test_heads_for_data_sets_share_the_levels():
    model = head(2, "dataset")
    with dn.use_domain(model, torch.tensor([1, 1])):
        model(levels())
    norm = model.regression_head.conv[0][1]
    assert norm.running_mean.shape == (2, 8) and norm.num_batches_tracked.tolist() == [0, 1]
    with pytest.raises(ValueError, match="use_domain"):
        model(levels())


@pytest.mark.parametrize("affine", ["shared", "per_domain"])
@pytest.mark.parametrize("known", [1, 2])
def test_a_new_domain_leaves_the_others_to_the_bit(known, affine):
    model = net(known, affine=affine)
    for k in range(known):
        if known > 1:
            dn.use_domain(model, k)
        model(images(seed=k))
    before, x = copy.deepcopy(model.eval()), images(seed=9)
    batches = [images(seed=s, scale=5.0) + 2 for s in (20, 21)]
    assert dn.add_domain(model, batches, "new", like=known - 1, progress=False) is model
    for k in range(known):
        with dn.use_domain(model, k):
            if known > 1:
                dn.use_domain(before, k)
            assert torch.equal(model(x), before(x))
    expected = dn.recompute_population_statistics(
        dn.convert_batchnorm(copy.deepcopy(net(1)), "DomainBatchNorm"), batches, progress=False
    )
    if affine == "shared":
        with dn.use_domain(model, "new"):
            close(model(x), expected.eval()(x))
    assert model[1].domain_names == (*map(str, range(known)), "new")
    with pytest.raises(ValueError, match="a domain 'new' already"):
        dn.add_domain(model, batches, "new")
    dn.add_domain(model, batches, "newer", like="new", progress=False)
    assert model[1].running_mean.shape == (known + 2, 6) and not model.training


def test_a_new_domain_of_a_head_with_levels():
    model = head()
    model(levels(seed=1))
    before = copy.deepcopy(model.eval())
    dn.add_domain(model, [levels(seed=s) for s in (2, 3)], "new", progress=False)
    with dn.use_domain(model, "0"):
        for key, value in before(levels()).items():
            assert torch.equal(model(levels())[key], value)
    assert model.classification_head.conv[1][1].running_mean.shape == (6, 8)


def test_a_new_domain_that_fails_leaves_the_model_as_it_was():
    model = net(1)
    model(images())
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    for batches, error in (([], ValueError), ([images(), torch.zeros(2, 5, 9, 9)], RuntimeError)):
        with pytest.raises(error):
            dn.add_domain(model, batches, "new", progress=False)
        assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert model.training and model[1].num_domains == 1 and model[1].domain_names is None


def test_adaptation_of_a_torchvision_model_recovers_a_changed_contrast():
    """Images of a third of the contrast, normalized by their own statistics, give what the full contrast gives."""
    torch.manual_seed(0)
    model = dn.convert_batchnorm(torchvision.models.resnet18(num_classes=4), "DomainBatchNorm").double()
    x = torch.randn(16, 3, 32, 32, dtype=torch.float64)
    dn.recompute_population_statistics(model, [x], progress=False)
    expected = model.eval()(x)
    dn.add_domain(model, [x / 3], "dim", progress=False)
    with dn.use_domain(model, "0"):
        wrong = (model(x / 3) - expected).abs().max()
    with dn.use_domain(model, "dim"):
        right = (model(x / 3) - expected).abs().max()
    assert right < 1e-2 * wrong


def test_the_nearest_domain_and_the_average():
    model = net()
    for k, scale in enumerate((1.0, 4.0)):
        with dn.use_domain(model, k):
            dn.recompute_population_statistics(model, [images(32, seed=k, scale=scale)], progress=False)
    model.eval()
    for k, scale in enumerate((1.0, 4.0)):
        assert [dn.nearest_domain(model, images(1, seed=s, scale=scale)) for s in range(5, 10)] == [k] * 5
    assert model[1].batch_hook is None and model[1].current_domain is None
    merged = dn.merge_domains(copy.deepcopy(model))
    both = dn.Moments(torch.ones(2, 1).double(), model[1].running_mean, model[1].running_var).merge(0)
    close(merged[1].running_var, both.var[0])
    assert merged(images()).shape == (6, 4, 5, 5) and merged[1].num_domains == 1


def test_a_new_domain_begins_with_the_affine_of_the_one_it_is_like():
    model = dn.name_domains(net(affine="per_domain"), ["day", "night"])
    with torch.no_grad():
        for layer in (model[1], model[4]):
            layer.weight.copy_(torch.tensor([[2.0], [3.0]]))
    dn.add_domain(model, [images()], "dusk", like="night", progress=False)
    for layer in (model[1], model[4]):
        assert layer.weight[:, 0].tolist() == [2.0, 3.0, 3.0] and layer.weight.requires_grad
