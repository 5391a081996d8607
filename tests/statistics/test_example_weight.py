"""Inference example weighing (Four Things, §3.1): a sample's own moments mixed into the population's."""

import copy

import pytest
import torch
from norm_cases import CASES, C, build, check_step, clone, close, make, random_input, refer, unchanged
from reference_norms import Reference
from torch import nn

import domainnorm as dn

SHAPE = (5, C, 2, 4)
ALL = ["plain", *CASES]


def make_any(name, **options):
    return build("DomainBatchNorm", **options) if name == "plain" else make(name, **options)


def trained(name, alpha=0.0, **options):
    """A layer and its reference after two steps, both in inference."""
    layer = make_any(name, **options)
    reference = Reference(C) if name == "plain" else refer(name)
    for step in range(2):
        check_step(layer, reference, random_input(*SHAPE, seed=step))
    layer.eval().example_weight = alpha
    return layer, reference


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("name", ALL)
def test_the_formula_literally(name, alpha):
    """Outputs and all gradients; those of x go through the sample's own moments."""
    layer, reference = trained(name, alpha)
    check_step(layer, reference, random_input(3, *SHAPE[1:], seed=5), alpha)


@pytest.mark.parametrize("shape", [(4, C), (3, C, 4), (2, C, 1, 4, 1)])
@pytest.mark.parametrize("name", [n for n in ALL if n != "bgn_pieces"])
def test_any_number_of_spatial_sizes(name, shape):
    layer, reference = trained(name, 0.3)
    check_step(layer, reference, random_input(*shape, seed=5), 0.3)


@pytest.mark.parametrize("name", ALL)
def test_weight_0_is_plain_inference(name):
    layer, _ = trained(name)
    weighed = copy.deepcopy(layer)
    weighed.example_weight = 0.0
    x = random_input(*SHAPE, seed=5)
    assert torch.equal(layer(x), weighed(x))
    weighed.example_weight = 1e-14  # not switched off, but as good as
    close(weighed(x), layer(x), atol=1e-11)


@pytest.mark.parametrize("name", ["plain", "ghost", "renorm", "renorm_micro"])
def test_weight_1_is_instance_norm(name):
    layer, _ = trained(name, 1.0)
    x = random_input(*SHAPE, seed=5)
    close(layer(x), nn.functional.instance_norm(x, weight=layer.weight, bias=layer.bias))


@pytest.mark.parametrize("examples", [1, 2, 5])
def test_weight_1_of_grouped_batch_norm_is_group_norm(examples):
    layer = build("GroupedBatchNorm", num_channel_groups=2, samples_per_group=examples)
    layer(random_input(*SHAPE))
    layer.eval().example_weight = 1.0
    for shape in (SHAPE, (3, C), (1, C, 5)):
        x = random_input(*shape, seed=5)
        close(layer(x), nn.functional.group_norm(x, 2, layer.weight, layer.bias))


def test_weight_1_of_batch_group_norm_is_group_norm():
    layer, _ = trained("bgn", 1.0)
    x = random_input(*SHAPE, seed=5)
    close(layer(x), nn.functional.group_norm(x, 2, layer.weight, layer.bias))


def test_weight_1_of_seq_norm_is_instance_norm_of_group_norm():
    layer, _ = trained("seq", 1.0)
    x = random_input(*SHAPE, seed=5)
    first = nn.functional.group_norm(x, 2)
    close(layer(x), nn.functional.instance_norm(first, weight=layer.weight, bias=layer.bias))


@pytest.mark.parametrize("name", ALL)
def test_a_sample_depends_on_no_other(name):
    layer, _ = trained(name, 0.4)
    x = random_input(*SHAPE, seed=5)
    y = layer(x)
    for n in range(len(x)):
        close(layer(x[n : n + 1]), y[n : n + 1])


@pytest.mark.parametrize("name", ALL)
def test_it_is_for_population_statistics_in_inference_only(name):
    """Nothing changes in training, nor where minibatch statistics normalize."""
    layer = make_any(name)
    weighed = copy.deepcopy(layer)
    weighed.example_weight = 0.7
    x = random_input(*SHAPE)
    assert torch.equal(layer(x), weighed(x))
    for other in (layer, weighed):
        other.eval().statistics = "minibatch"
    assert torch.equal(layer(x), weighed(x))
    for name_, value in layer.named_buffers():
        assert torch.equal(weighed.get_buffer(name_), value)


@pytest.mark.parametrize("name", ALL)
def test_no_buffer_changes(name):
    layer, _ = trained(name, 0.5)
    before = copy.deepcopy(layer.state_dict())
    layer(random_input(*SHAPE))
    assert unchanged(layer, before)


@pytest.mark.parametrize("name", ["plain", "ghost", "gbgn", "bgn", "seq", "renorm"])
def test_each_domain_mixes_with_its_own_population(name):
    layer = make_any(name, num_domains=2, affine="per_domain")
    xs = [random_input(*SHAPE, seed=k) * (k + 1) + k for k in range(2)]
    layer(xs)
    layer.eval().example_weight = 0.3
    ys = layer(xs)
    for k in range(2):
        alone = make_any(name)
        alone.load_state_dict({name_: value[k] for name_, value in layer.state_dict().items()})
        alone.eval().example_weight = 0.3
        close(ys[k], alone(xs[k]))
        close(layer(xs[k], domain=k), ys[k])
    mixed = layer(torch.cat([xs[1], xs[0]]), domain=torch.tensor([1] * 5 + [0] * 5))
    close(mixed, torch.cat([ys[1], ys[0]]))


@pytest.mark.parametrize("name", ["plain", "ghost", "gbgn", "bgn", "renorm"])
def test_large_means_in_float32(name):
    """E[x²] - E[x]² of float32 would be off by several standard deviations."""
    layer = make_any(name, dtype=torch.float32, affine=None, momentum=1.0)
    reference = Reference(C) if name == "plain" else refer(name)
    reference.momentum = 1.0
    x = (random_input(4, C, 8, 8) + 1e4).detach().float()
    layer(x), reference.train(x.double(), None, None)
    layer.eval().example_weight = 0.4
    x = x.flip(0) + 0.5
    torch.testing.assert_close(layer(x).double(), reference.infer(x.double(), None, None, 0.4), atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", [n for n in ALL if n != "bgn_pieces"])
def test_one_element_of_weight_1_is_the_bias(name):
    layer = make_any(name)
    layer.eval().example_weight = 1.0
    if name in ("seq", "bgn", "gbgn"):  # a channel group has more elements
        assert layer(random_input(3, C)).isfinite().all()
    else:
        close(layer(random_input(3, C)), layer.bias.expand(3, C))


@pytest.mark.parametrize("name", ALL)
def test_empty_inputs(name):
    layer, _ = trained(name, 0.5)
    x = random_input(0, *SHAPE[1:])
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


@pytest.mark.parametrize("name", ["ghost", "seq", "bgn", "gbgn"])
def test_gradcheck(name):
    layer, _ = trained(name, 0.4)
    assert torch.autograd.gradcheck(layer, clone(random_input(2, C, 3)))


# ---- the attribute and set_example_weight --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_attribute(name):
    layer = make_any(name)
    assert layer.example_weight == 0
    keys = layer.state_dict().keys()
    layer.example_weight = 0.25
    assert layer.example_weight == 0.25 and copy.deepcopy(layer).example_weight == 0.25
    assert layer.state_dict().keys() == keys and "example_weight=0.25" in repr(layer)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"example_weight.*0.*1.*got"):
            layer.example_weight = wrong
    assert layer.example_weight == 0.25


def test_set_example_weight_reaches_every_layer():
    model = nn.Sequential(nn.Conv2d(1, C, 1), *[make_any(name) for name in ALL], nn.Sequential(make("ghost")))
    assert dn.set_example_weight(model, 0.3) is model
    layers = [m for m in model.modules() if hasattr(m, "example_weight")]
    assert len(layers) == len(ALL) + 1 and all(m.example_weight == 0.3 for m in layers)
    with pytest.raises(ValueError, match=r"0 to 1, got 2\.0"):
        dn.set_example_weight(model, 2.0)
    assert all(m.example_weight == 0.3 for m in layers)


@pytest.mark.parametrize(
    ("other", "remedy"), [(nn.BatchNorm2d(C), "convert_batchnorm"), (nn.GroupNorm(2, C), "convert_groupnorm")]
)
def test_set_example_weight_refuses_layers_of_torch(other, remedy):
    model = nn.Sequential(make("ghost"), nn.Sequential(other))
    with pytest.raises(TypeError, match=rf"1\.0.*{type(other).__name__}.*{remedy}"):
        dn.set_example_weight(model, 0.5)
    assert model[0].example_weight == 0


# ---- the average of x² ---------------------------------------------------------------------------------------------


def squares(layer):
    """m_x²: what the layer keeps, as the paper has it."""
    return layer.running_total_var + layer.running_mean.square()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", ["plain", "ghost", "gbgn", "renorm", "bgn", "seq"])
def test_the_average_of_squares_is_exact(name, momentum):
    layer = make_any(name, momentum=momentum, track_total_var=True)
    mean, square = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for step in range(1, 6):
        x = random_input(4, C, 3, seed=step) * step
        layer(x)
        z = nn.functional.group_norm(x, layer.num_channel_groups) if name == "seq" else x
        z = z.transpose(0, 1).reshape(len(layer.running_mean), -1)  # of the buffers' channels
        rate = momentum or 1 / step
        mean, square = mean + rate * (z.mean(1) - mean), square + rate * (z.square().mean(1) - square)
        close(layer.running_mean, mean)
        close(squares(layer), square)


@pytest.mark.parametrize("population", ["shared", "per_domain"])
@pytest.mark.parametrize("ids", [False, True])
def test_the_average_of_squares_of_domains(population, ids):
    options = {"num_domains": 2, "population_statistics": population, "track_total_var": True, "dtype": torch.float64}
    layer = dn.DomainBatchNorm(C, **options)
    twins = [dn.DomainBatchNorm(C, track_total_var=True, dtype=torch.float64) for _ in range(2)]
    for step in range(3):
        xs = [random_input(4, C, 3, seed=step), random_input(3, C, 3, seed=9 + step)]
        layer(torch.cat(xs), domain=torch.tensor([0] * 4 + [1] * 3)) if ids else layer(xs)
        for k, x in enumerate(xs):
            twins[0 if population == "shared" else k](x)
    if population == "shared":
        close(layer.running_total_var, twins[0].running_total_var)
    else:
        close(layer.running_total_var, torch.stack([twin.running_total_var for twin in twins]))


@pytest.mark.parametrize(("size", "without"), [(2, 0.75), (4, 0.875)])
def test_small_batches_do_not_lose_the_variance_between_them(size, without):
    """True variance 1, half of it between images: the mean of the batches' variances is less."""
    found = []
    for tracks in (True, False):
        layer = dn.DomainBatchNorm(1, affine=None, momentum=None, track_total_var=tracks, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3000):
            centers = torch.randn(size, 1, 1, 1, generator=generator, dtype=torch.float64)
            x = (centers + torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64)) / 2**0.5
            layer(x)
        layer.eval().example_weight = 1e-9
        x = torch.tensor([[[[-0.5, 0.5]]]], dtype=torch.float64)
        found.append(float((x[..., 1] - x[..., 0]) / (layer(x)[..., 1] - layer(x)[..., 0])) ** 2)
    assert abs(found[0] - 1) < 0.03 and abs(found[1] - without) < 0.03


@pytest.mark.parametrize("method", ["pooled", "mean_of_variances", "exact"])
def test_recomputed_statistics_contain_it(method):
    layer = dn.DomainBatchNorm(C, track_total_var=True, dtype=torch.float64)
    x = random_input(12, C, 3).detach() * 3
    dn.recompute_population_statistics(layer, x.split(2), method=method, progress=False)
    close(layer.running_total_var, x.transpose(0, 1).flatten(1).var(1, correction=0))


def test_it_changes_nothing_but_the_weighing():
    layer, plain = (dn.DomainBatchNorm(C, track_total_var=tracks) for tracks in (True, False))
    for step in range(3):
        x = random_input(4, C, 30, 30, seed=step, dtype=torch.float32)
        torch.testing.assert_close(layer(x), plain(x))
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    layer.example_weight = plain.example_weight = 0.3
    assert not torch.allclose(layer(x), plain(x))


def test_large_means_lose_no_digits_of_it():
    layer = dn.DomainBatchNorm(C, track_total_var=True, momentum=None)
    batches = [(random_input(4, C, 8, seed=k).detach() + 1e4).float() for k in range(5)]
    for x in batches:
        layer(x)
    expected = torch.cat(batches).double().transpose(0, 1).flatten(1).var(1, correction=0)
    torch.testing.assert_close(layer.running_total_var.double(), expected, rtol=1e-3, atol=0)


def test_checkpoints_with_it_and_without():
    with_it, plain = (dn.DomainBatchNorm(C, track_total_var=tracks) for tracks in (True, False))
    with_it(random_input(4, C, 3, dtype=torch.float32)), plain(random_input(4, C, 3, dtype=torch.float32))
    adopting = dn.DomainBatchNorm(C)
    adopting.load_state_dict(with_it.state_dict())
    assert torch.equal(adopting.running_total_var, with_it.running_total_var) and adopting.track_total_var
    old = dn.DomainBatchNorm(C, track_total_var=True)
    old.load_state_dict(nn.BatchNorm2d(C).state_dict())
    old.load_state_dict(plain.state_dict())
    assert torch.equal(old.running_total_var, plain.running_var)
    ghost = dn.convert_batchnorm(nn.Sequential(with_it), "GhostBN", samples_per_group=2)[0]
    assert torch.equal(ghost.running_total_var, with_it.running_total_var)
    with_it.reset_running_stats()
    assert torch.equal(with_it.running_total_var, torch.ones(C))


def test_domains_are_added_and_merged_with_it():
    model = nn.Sequential(dn.DomainBatchNorm(C, track_total_var=True))
    model[0](random_input(4, C, 3, dtype=torch.float32))
    x = random_input(6, C, 3, seed=2, dtype=torch.float32).detach()
    dn.add_domain(model, [x], "new", progress=False)
    assert model[0].running_total_var.shape == (2, C)
    torch.testing.assert_close(model[0].running_total_var[1], x.transpose(0, 1).flatten(1).var(1, correction=0))
    mean, total = model[0].running_mean, model[0].running_total_var
    expected = total.mean(0) + mean.var(0, correction=0)
    torch.testing.assert_close(dn.merge_domains(model)[0].running_total_var, expected)
