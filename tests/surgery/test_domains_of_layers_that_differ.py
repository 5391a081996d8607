"""Domains of models whose layers name, number or share them otherwise; one change after another."""

import copy
import itertools

import pytest
import torch
from torch import nn

import domainnorm as dn

CHOICES = ("shared", "per_domain")
KINDS = {
    "DomainBatchNorm": {},
    "GhostBatchNorm": {"samples_per_group": 2},
    "BatchRenorm": {},
    "BatchGroupNorm": {"num_groups": 2},
    "SeqNorm": {"num_channel_groups": 2, "num_sample_groups": 2},
}


def images(seed=0):
    return torch.randn(6, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def trained(*layers):
    """A network whose layers have statistics of their own in every domain."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), layers[0], nn.Tanh(), nn.Conv2d(4, 4, 3), *layers[1:]).double()
    for seed, value in enumerate(model.parameters()):
        nn.init.normal_(value, 0.5, 0.3, torch.Generator().manual_seed(seed))
    for seed, (name, value) in enumerate(model.named_buffers()):
        if name.endswith(("mean", "var")):
            value.copy_(torch.rand(value.shape, generator=torch.Generator().manual_seed(seed)) + 0.2)
    return model.eval()


def named(names, **options):
    layer = dn.DomainBatchNorm(4, num_domains=len(names), affine="per_domain", **options)
    layer.domain_names = names
    return layer


def in_domain(model, domain, x=None):
    with dn.use_domain(model, domain), torch.no_grad():
        return model(images() if x is None else x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sgd", "population", "affine"), list(itertools.product(CHOICES, CHOICES, ("shared", "per_domain", None)))
)
@pytest.mark.parametrize("number", [1, 2])
def test_a_new_domain_leaves_the_others_to_the_bit(kind, sgd, population, affine, number):
    choices = {"sgd_statistics": sgd, "population_statistics": population, "affine": affine, "num_domains": number}
    first, second = (getattr(dn, kind)(4, **choices, **KINDS[kind]) for _ in range(2))
    model = trained(first, second)
    with torch.no_grad():
        before = [in_domain(model, k) for k in range(number)] if number > 1 else [model(images())]
    dn.add_domain(model, [images(k) + 1 for k in range(4)], "new", progress=False)
    assert first.domain_names == (*map(str, range(number)), "new")
    for k, expected in enumerate(before):
        assert torch.equal(in_domain(model, k), expected)
    new = in_domain(model, "new", torch.cat([images(k) + 1 for k in range(4)]))
    if kind not in ("SeqNorm", "BatchGroupNorm") and affine is None:
        torch.testing.assert_close(new.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), atol=0.05, rtol=0)
        torch.testing.assert_close(new.var((0, 2, 3)), torch.ones(4, dtype=torch.float64), atol=0.2, rtol=0)
    reloaded = copy.deepcopy(model)
    reloaded.load_state_dict(model.state_dict())
    assert torch.equal(in_domain(reloaded, "new"), in_domain(model, "new"))
    model.train()
    with dn.use_domain(model, "new"):
        model(images()).sum().backward()  # and it is trained on


def test_a_new_domain_of_a_model_with_frozen_norms_of_several_domains():
    frozen = dn.FrozenBatchNorm.from_batch_norm(named(("night", "day")))
    model = trained(frozen, named(("day", "night")))
    before = {name: in_domain(model, name) for name in ("day", "night")}
    dn.add_domain(model, [images(k) for k in range(3)], "dusk", like="day", progress=False)
    assert frozen.domain_names == ("night", "day", "dusk") and model[4].domain_names == ("day", "night", "dusk")
    assert torch.equal(frozen.running_mean[2], frozen.running_mean[1])
    assert torch.equal(model[4].weight[2], model[4].weight[0])
    for name, expected in before.items():
        assert torch.equal(in_domain(model, name), expected)
    in_domain(model, "dusk")


def test_names_are_looked_up_in_each_layer():
    model = trained(named(("day", "night")), named(("night", "dusk", "day")))
    same = copy.deepcopy(model)
    for key in ("running_mean", "running_var", "weight", "bias"):
        own = getattr(same[4], key)
        own.data.copy_(own.data[[2, 1, 0]])
    same[4].domain_names = ("day", "dusk", "night")
    for name in ("day", "night"):
        expected = in_domain(same, name)
        assert torch.equal(in_domain(model, name), expected)
        assert torch.equal(dn.keep_domain(copy.deepcopy(model), name)(images()), expected)
    with pytest.raises(ValueError, match=r"domains of 1 are \['day', 'night'\], got 'dusk'"):
        dn.use_domain(model, "dusk")
    with pytest.raises(ValueError, match=r"domains are 0 to 1, got 2, which 1 does not have"):
        dn.use_domain(model, 2)


def test_layers_without_names_have_those_of_layers_with_as_many():
    unnamed = dn.DomainBatchNorm(4, num_domains=2)
    model = trained(unnamed, named(("day", "night")))
    with dn.use_domain(model, "night"):
        assert unnamed.current_domain == 1
    model = trained(unnamed, named(("day", "night")), named(("night", "day")))
    with pytest.raises(ValueError, match=r"1 are without names, and those of others are called .*name_domains"):
        dn.use_domain(model, "night")
    model = trained(unnamed, named(("day", "dusk", "night")))
    with pytest.raises(ValueError, match=r"1 are without names, and no other with as many has any"):
        dn.use_domain(model, "night")
    assert unnamed.current_domain is None


def test_the_nearest_domain_of_layers_that_number_otherwise_is_a_name():
    model = trained(named(("day", "night")), named(("night", "day")))
    x = images()
    model[1].running_mean[1] = model[0](x).mean((0, 2, 3)).detach()
    model[1].running_var[1] = model[0](x).var((0, 2, 3)).detach()
    assert dn.nearest_domain(model, x) == "night"
    dn.use_domain(model, dn.nearest_domain(model, x))
    assert (model[1].current_domain, model[4].current_domain) == (1, 0)
    model[4].domain_names = ("day", "night")
    assert dn.nearest_domain(model, x) == 1


def test_a_block_ends_well_whatever_was_done_to_the_domains_in_it():
    model = trained(named(("day", "night", "dusk")), named(("day", "night", "dusk")))
    dn.use_domain(model, "dusk")
    with dn.use_domain(model, "day"):
        dn.keep_domain(model, "night")
    assert model[1].current_domain is None and model(images()).shape == (6, 4, 3, 3)
    dn.add_domain(model, [images(k) for k in range(3)], "dawn", progress=False)
    with dn.use_domain(model, "dawn"):
        dn.add_domain(model, [images(k) for k in range(3)], "noon", progress=False)
        assert model[1].current_domain == 1
        dn.convert_batchnorm(model, "BatchRenorm")
        assert model[1].current_domain == 1
    assert model[1].current_domain is None
    assert isinstance(model[1], dn.BatchRenorm) and model[1].domain_names == ("0", "dawn", "noon")
    dn.merge_domains(model)
    assert model(images()).shape == (6, 4, 3, 3) and model[1].num_domains == 1
    with pytest.raises(ValueError, match="no norm with several domains"):
        dn.keep_domain(model, 0)


def test_layers_with_fewer_domains_are_left_alone_by_names_of_others():
    model = trained(dn.DomainBatchNorm(4), named(("day", "night")))
    before = in_domain(model, "night")
    dn.add_domain(model, [images(k) for k in range(3)], "dusk", like="night", progress=False)
    assert model[1].domain_names == ("0", "dusk") and model[4].domain_names == ("day", "night", "dusk")
    assert torch.equal(model[4].weight[2], model[4].weight[1])
    with pytest.raises(ValueError, match=r"domains of 1 are \['0', 'dusk'\], got 'night'"):
        dn.use_domain(model, "night")
    dn.name_domains(model, ["day", "night", "dusk"])
    model[1].domain_names = ("night", "dusk")
    assert torch.equal(in_domain(model, "night"), before)
