"""GhostBN: a group of samples is a normalization batch, as in accumulated gradients and unsynchronized processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import (
    C,
    all_close,
    build,
    check_same_step,
    check_step,
    check_steps,
    clone,
    close,
    gradients,
    random_input,
    with_affine_of,
)
from ranks import run_ranks
from reference_norms import GhostReference, ghost_sizes
from torch import nn

import domainnorm as dn


def ghost(channels=C, **options):
    return build("GhostBatchNorm", channels, **options)


def test_the_worked_example_of_the_paper():
    """Ghost Normalization, §2.2: the second value, larger than the fifth, becomes smaller."""
    x = torch.tensor([35, 39, 30, 4, 38, 26, 27, 19.0]).view(8, 1, 1)
    expected = torch.tensor([0.6, 0.9, 0.2, -1.7, 1.5, -0.2, -0.07, -1.2])
    for layer in (dn.GhostBatchNorm(1, num_sample_groups=2), dn.GhostBatchNorm(1, samples_per_group=4)):
        y = layer(x).detach().flatten()
        torch.testing.assert_close(y, expected, atol=0.05, rtol=0)
        assert abs(y[6] + 0.07) < 0.005 and y[1] < y[4]
    plain = dn.GhostBatchNorm(1, num_sample_groups=1)(x).detach().flatten()
    expected = torch.tensor([0.7, 1.1, 0.3, -2.2, 1.0, -0.1, -0.02, -0.8])
    torch.testing.assert_close(plain, expected, atol=0.0501, rtol=0)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_partition(data):
    n = data.draw(st.integers(1, 7), "n")
    spatial = data.draw(st.sampled_from([(), (1,), (2,), (2, 2), (1, 2, 2)]), "spatial")
    which = data.draw(st.sampled_from(["samples_per_group", "num_sample_groups"]), "which")
    number = data.draw(st.integers(1, n), which)
    elements = torch.Size(spatial).numel()
    size = number if which == "samples_per_group" else -(-n // number)
    layer, x = ghost(2, **{which: number}), random_input(n, 2, *spatial)
    if any(s * elements == 1 for s in ghost_sizes(n, size, elements)):
        with pytest.raises(ValueError, match="more than 1 value"):
            layer(x)
    else:
        check_step(layer, GhostReference(2, **{which: number}), x)


@pytest.mark.parametrize(
    ("samples", "options", "sizes"),
    [
        (8, {"samples_per_group": 3}, [3, 3, 2]),
        (7, {"samples_per_group": 3}, [3, 4]),  # the last would be one element
        (7, {"num_sample_groups": 3}, [3, 4]),
        (5, {"num_sample_groups": 4}, [2, 3]),  # ⌈5 / 4⌉ = 2
        (6, {"num_sample_groups": 4}, [2, 2, 2]),
        (3, {"samples_per_group": 3}, [3]),
        (2, {"samples_per_group": 1}, [2]),  # the last of one element joins the one before
        (2, {"num_sample_groups": 2}, [2]),
    ],
)
def test_groups_are_consecutive_samples(samples, options, sizes):
    x = random_input(samples, C)
    y = ghost(affine=None, **options)(x)
    expected = [nn.functional.batch_norm(part, None, None, training=True) for part in x.split(sizes)]
    close(y, torch.cat(expected))


def test_one_sample_of_several_elements_is_a_group_of_its_own():
    x = random_input(5, C, 2)
    y = ghost(affine=None, samples_per_group=2)(x)
    close(y[4:], nn.functional.batch_norm(x[4:], None, None, training=True))


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("options", [{"samples_per_group": 6}, {"num_sample_groups": 1}])
def test_one_group_is_batch_norm(options, momentum):
    layer = ghost(**options, momentum=momentum)
    plain = with_affine_of(layer, nn.BatchNorm2d(C, momentum=momentum, dtype=torch.float64))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    for step in range(3):
        check_same_step(layer, plain, random_input(6, C, 3, 2, seed=step))
    check_same_step(layer.eval(), plain.eval(), random_input(2, C, 5, 1, seed=9))


def test_population_statistics_are_those_of_batch_norm_whatever_the_groups():
    plain = nn.BatchNorm1d(C, dtype=torch.float64)
    layers = [ghost(samples_per_group=2), ghost(samples_per_group=3), ghost(num_sample_groups=4)]
    for step in range(3):
        x = random_input(7, C, 3, seed=step)
        for layer in (plain, *layers):
            layer(x)
    for layer in layers:
        for name, value in plain.named_buffers():
            close(layer.get_buffer(name), value)


def test_gradient_accumulation_is_ghost_batch_norm():
    """n passes through nn.BatchNorm2d, gradients added up, are n groups."""
    layer = ghost(samples_per_group=2)
    plain = with_affine_of(layer, nn.BatchNorm2d(C, dtype=torch.float64))
    x = random_input(7, C, 3, 2)
    twin, cotangent = clone(x), torch.randn(7, C, 3, 2, dtype=torch.float64)
    (layer(x) * cotangent).sum().backward()
    for part, g in zip(twin.split(2), cotangent.split(2), strict=True):
        (plain(part) * g).sum().backward()
    close(x.grad, twin.grad)
    all_close([p.grad for p in layer.parameters()], [p.grad for p in plain.parameters()])


def plain_on_a_half(rank, x, weight, bias, cotangent):
    plain = nn.BatchNorm2d(C, dtype=torch.float64)
    plain.load_state_dict({**plain.state_dict(), "weight": weight, "bias": bias})
    half = clone(x.chunk(2)[rank])
    y = plain(half)
    (y * cotangent.chunk(2)[rank]).sum().backward()
    return y.detach(), half.grad, plain.weight.grad, plain.bias.grad


def test_two_processes_without_synchronization_are_two_groups():
    layer, x = ghost(num_sample_groups=2), random_input(6, C, 2, 3)
    cotangent = torch.randn(x.shape, dtype=x.dtype)
    ranks = run_ranks(plain_on_a_half, 2, x.detach(), layer.weight.detach(), layer.bias.detach(), cotangent)
    outputs, grads, weights, biases = zip(*ranks, strict=True)
    y = layer(x)
    (y * cotangent).sum().backward()
    all_close([y.detach(), x.grad], [torch.cat(outputs), torch.cat(grads)])
    all_close([layer.weight.grad, layer.bias.grad], [sum(weights), sum(biases)])


def test_a_nan_stays_in_its_group():
    layer, x = ghost(samples_per_group=2), random_input(6, C, 3).detach()
    expected = layer(x)
    x[0, 0, 0] = torch.nan
    y = layer(x)
    assert y[:2, 0].isnan().all()
    close(y[2:], expected[2:])
    close(y[:2, 1:], expected[:2, 1:])


# ---- inference under minibatch statistics --------------------------------------------------------------------------


def test_in_inference_a_smaller_batch_is_one_group():
    layer = ghost(samples_per_group=4).eval()
    layer.statistics = "minibatch"
    x = random_input(3, C, 2)
    plain = with_affine_of(layer, nn.BatchNorm1d(C, dtype=torch.float64)).train()
    check_same_step(layer, plain, x, buffers=False)
    assert layer.num_batches_tracked == 0 and (layer.running_mean == 0).all()


def test_in_inference_fewer_samples_than_groups_are_groups_of_one():
    layer = ghost(num_sample_groups=4).eval()
    layer.statistics = "minibatch"
    x = random_input(2, C, 3)
    y = layer(x)
    assert y.isfinite().all() and y.shape == x.shape


# ---- domains -------------------------------------------------------------------------------------------------------


def test_shared_statistics_join_the_groups_of_equal_number():
    """Each domain's samples are split into groups of their own; the g-th groups of all are one normalization batch."""
    sizes = [(4, 3, 2), (6, 2, 2), (2, 1, 3)]  # 2, 3 and 1 groups of 2 samples
    xs = [random_input(n, C, *spatial, seed=k) for k, (n, *spatial) in enumerate(sizes)]
    layer = ghost(samples_per_group=2, num_domains=3, sgd_statistics="shared", affine="per_domain")
    plain = dn.DomainBatchNorm(C, num_domains=3, sgd_statistics="shared", affine="per_domain", dtype=torch.float64)
    with_affine_of(layer, plain)
    twins = [clone(x) for x in xs]
    parts = [plain([t[2 * g : 2 * g + 2] for t in twins]) for g in range(3)]
    expected = [torch.cat([part[k] for part in parts]) for k in range(3)]
    ys = layer(xs)
    all_close(ys, expected)
    y, want = (torch.cat([t.flatten() for t in v]) for v in (ys, expected))
    all_close(gradients(y, [*xs, *layer.parameters()]), gradients(want, [*twins, *plain.parameters()]))


@pytest.mark.parametrize("population", ["shared", "per_domain"])
@pytest.mark.parametrize("sgd", ["shared", "per_domain"])
def test_population_statistics_of_domains_do_not_depend_on_the_groups(sgd, population):
    xs = [random_input(n, C, 2, seed=n) for n in (4, 6)]
    layer = ghost(samples_per_group=2, num_domains=2, sgd_statistics=sgd, population_statistics=population)
    plain = dn.DomainBatchNorm(
        C, num_domains=2, sgd_statistics=sgd, population_statistics=population, dtype=torch.float64
    )
    for _ in range(2):
        layer(xs), plain(xs)
    for name, value in plain.named_buffers():
        close(layer.get_buffer(name), value)


@pytest.mark.parametrize("option", ["samples_per_group", "num_sample_groups"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_domain_smaller_than_a_group_is_refused_as_by_a_layer_of_its_own(option, mixed):
    layer = ghost(num_domains=2, **{option: 2})
    small, large = random_input(1, C, 3), random_input(4, C, 3)
    with pytest.raises(ValueError, match=r"\b2\b.*\b1\b"):
        if mixed:
            layer(torch.cat([small, large]), domain=torch.tensor([0, 1, 1, 1, 1]))
        else:
            layer([small, large])


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"samples_per_group": 2, "num_sample_groups": 2},
        {"samples_per_group": 0},
        {"num_sample_groups": 0},
        {"samples_per_group": -3},
    ],
)
def test_exactly_one_positive_option(options):
    with pytest.raises(ValueError, match=r"samples_per_group.*num_sample_groups|positive"):
        dn.GhostBatchNorm(C, **options)


@pytest.mark.parametrize("option", ["samples_per_group", "num_sample_groups"])
def test_too_small_a_batch_is_refused_in_training(option):
    layer = ghost(**{option: 7})
    with pytest.raises(ValueError, match=r"7.*5|5.*7"):
        layer(random_input(5, C, 2))
    assert layer.num_batches_tracked == 0
    layer.eval()(random_input(5, C, 2))


def test_groups_of_one_element_are_refused_in_training():
    layer = ghost(samples_per_group=1)
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(random_input(4, C))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("shape", [(6, C), (5, C, 3), (5, C, 2, 3), (4, C, 2, 1, 2)])
@pytest.mark.parametrize("options", [{"samples_per_group": 3}, {"num_sample_groups": 2}])
def test_steps(shape, options):
    check_steps(ghost(**options), GhostReference(C, **options), *shape)
