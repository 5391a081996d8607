"""Batch Renorm: Algorithm 1 of the paper, its backward formulas, its schedules, its micro-batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import (
    C,
    all_close,
    build,
    check_buffers,
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
from reference_norms import RenormReference
from torch import nn

import domainnorm as dn

OFF = {"r_max": 1.0, "d_max": 0.0}
TIGHT = {"r_max": 1.2, "d_max": 0.3}


def renorm(channels=C, **options):
    return build("BatchRenorm", channels, **options)


@pytest.mark.parametrize("shape", [(6, C), (5, C, 3), (5, C, 2, 3), (4, C, 2, 1, 2)])
@pytest.mark.parametrize(
    "options", [{}, TIGHT, {**TIGHT, "samples_per_group": 2}, {"momentum": 0.5}, {"momentum": None}]
)
def test_steps(shape, options):
    check_steps(renorm(**options), RenormReference(C, **options), *shape, steps=4)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(2, 7),
    size=st.integers(1, 7),
    r_max=st.floats(1, 4),
    d_max=st.floats(0, 3),
    eps=st.sampled_from([1e-5, 1e-1]),
)
def test_any_limits_and_micro_batches(n, size, r_max, d_max, eps):
    options = {"r_max": r_max, "d_max": d_max, "samples_per_group": min(size, n), "eps": eps, "momentum": 0.3}
    layer, reference = renorm(2, **options), RenormReference(2, **options)
    for step in range(2):
        check_step(layer, reference, random_input(n, 2, 3, seed=step))


def test_defaults_are_those_of_the_paper():
    layer = dn.BatchRenorm(C)
    assert layer.momentum == 0.01 and "r_max=3.0" in repr(layer) and "d_max=5.0" in repr(layer)


# ---- limits --------------------------------------------------------------------------------------------------------


def test_without_correction_it_is_batch_norm_in_outputs_and_gradients():
    layer = renorm(**OFF)
    plain = with_affine_of(layer, nn.BatchNorm2d(C, dtype=torch.float64))
    for step in range(3):
        check_same_step(layer, plain, random_input(4, C, 3, 2, seed=step), buffers=False)


def test_without_limits_training_is_inference():
    """r = σ_B / σ and d = (μ_B - μ) / σ undo the minibatch: the buffers from before the step normalize."""
    layer = renorm(r_max=1e6, d_max=1e6, momentum=0.2)
    layer(random_input(4, C, 3, 2))
    x = random_input(4, C, 3, 2, seed=1)
    expected = layer.eval()(x)
    close(layer.train()(x), expected)


def test_a_converted_batch_norm_infers_the_same():
    plain = nn.BatchNorm2d(C, dtype=torch.float64)
    plain(random_input(4, C, 3, 3))
    layer = dn.BatchRenorm(C, dtype=torch.float64)
    layer.load_state_dict(plain.state_dict())
    x = random_input(2, C, 3, 2, seed=1)
    close(layer.eval()(x), plain.eval()(x))


def test_the_buffers_hold_a_standard_deviation():
    """σ, not σ², is averaged: from 1 towards that of the (biased) batch."""
    layer = renorm(momentum=0.25, eps=1e-3)
    x = random_input(4, C, 3)
    layer(x)
    batch = (x.detach().transpose(0, 1).flatten(1).var(1, correction=0) + 1e-3).sqrt()
    sigma = 0.75 * (1 + 1e-3) ** 0.5 + 0.25 * batch
    close(layer.running_var, sigma.square() - 1e-3)
    close((layer.running_var + layer.eps).sqrt(), sigma)


def test_momentum_one_keeps_the_last_batch():
    layer = renorm(momentum=1.0)
    x = random_input(4, C, 3)
    layer(random_input(4, C, 3, seed=1))
    layer(x)
    close(layer.running_var, x.detach().transpose(0, 1).flatten(1).var(1, correction=0))


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, TIGHT, OFF])
def test_the_backward_formulas_of_the_paper(options):
    layer = renorm(**options)
    layer(random_input(5, C, 3, seed=1) * 2)
    x = random_input(5, C, 3)
    before = layer.running_mean.clone(), (layer.running_var + layer.eps).sqrt()
    g = torch.randn(5, C, 3, dtype=torch.float64)
    (layer(x) * g).sum().backward()

    m, row = 15, (1, -1, 1)
    mu, sigma = (v.view(row) for v in before)
    weight, data = layer.weight.detach().view(row), x.detach()
    mean = data.mean((0, 2), keepdim=True)
    std = (data.var((0, 2), correction=0, keepdim=True) + layer.eps).sqrt()
    r_max, d_max = options.get("r_max", 3.0), options.get("d_max", 5.0)
    r = (std / sigma).clamp(1 / r_max, r_max)
    d = ((mean - mu) / sigma).clamp(-d_max, d_max)
    dxhat = g * weight
    dstd = (dxhat * (data - mean) * -r / std.square()).sum((0, 2), keepdim=True)
    dmean = (dxhat * -r / std).sum((0, 2), keepdim=True)
    close(x.grad, dxhat * r / std + dstd * (data - mean) / (m * std) + dmean / m)
    close(layer.weight.grad, (g * ((data - mean) / std * r + d)).sum((0, 2)))
    close(layer.bias.grad, g.sum((0, 2)))


def test_the_gradient_is_blind_to_shift_and_scale():
    """Σ ∂ℓ/∂x = 0 and Σ x·∂ℓ/∂x = 0, at any r and d (§3 of the paper)."""
    layer = renorm(eps=1e-14)
    x = random_input(5, C, 3)
    (grad,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
    close(grad.sum((0, 2)), torch.zeros(C, dtype=torch.float64))
    close((grad * x).sum((0, 2)).detach(), torch.zeros(C, dtype=torch.float64))


# ---- schedules -----------------------------------------------------------------------------------------------------

POINTS = {"r_max": [(2, 1.0), (6, 3.0)], "d_max": [(1, 0.0), (3, 0.5), (5, 4.0)]}


@pytest.mark.parametrize(
    "options",
    [POINTS, {"r_max": lambda step: 1 + 0.5 * step, "d_max": lambda step: 0.1 * step}, {**POINTS, "r_max": 2.0}],
    ids=["points", "functions", "mixed"],
)
def test_schedules_of_the_step(options):
    """The first forward is at step 0; before the first and after the last point the limit is constant."""
    layer, reference = renorm(**options), RenormReference(C, **options)
    for step in range(9):
        check_step(layer, reference, random_input(4, C, 3, seed=step) * (3 - 0.3 * step) + step)
        if step == 4:
            check_step(layer.eval(), reference, random_input(2, C, 3))  # inference is no step
            layer.train()


def test_the_schedule_of_the_paper():
    """BatchNorm for 5000 steps, then linear to r_max = 3 at 40k and d_max = 5 at 25k."""
    options = {"r_max": [(5000, 1.0), (40_000, 3.0)], "d_max": [(5000, 0.0), (25_000, 5.0)]}
    for step in (0, 4999, 5000, 15_000, 24_999, 30_000, 40_000, 10**6):
        layer, reference = renorm(**options), RenormReference(C, **options)
        layer.num_batches_tracked.fill_(step)
        reference.steps = step
        check_step(layer, reference, random_input(4, C, 3) * 20 + 100)


def test_a_resumed_schedule_goes_on():
    layer, resumed = renorm(**POINTS), renorm(**POINTS)
    for step in range(4):
        layer(random_input(4, C, 3, seed=step))
    resumed.load_state_dict(layer.state_dict())
    check_same_step(resumed, layer, random_input(4, C, 3, seed=9))


@pytest.mark.parametrize(
    "options",
    [
        {"r_max": 0.5},
        {"d_max": -1.0},
        {"r_max": [(0, 1.0), (5, 0.5)]},
        {"d_max": [(0, 0.0), (5, -2.0)]},
        {"r_max": [(5, 1.0), (0, 3.0)]},
        {"r_max": []},
        {"samples_per_group": 0},
    ],
)
def test_wrong_limits(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        dn.BatchRenorm(C, **options)


# ---- micro-batches -------------------------------------------------------------------------------------------------


def test_micro_batches_are_normalized_apart_with_the_buffers_of_before():
    """Paper, §4.2: as one layer called on each micro-batch with the same buffers."""
    layer = renorm(samples_per_group=2, **TIGHT)
    layer(random_input(4, C, 3, seed=1))
    x = random_input(5, C, 3)
    twin, parts, parameters = clone(x), [], []
    for part in twin.split(2):
        alone = renorm(**TIGHT)
        alone.load_state_dict(layer.state_dict())
        parts.append(alone(part))
        parameters.append(list(alone.parameters()))
    y, expected = layer(x), torch.cat(parts)
    close(y, expected)
    close(gradients(y, [x])[0], gradients(expected, [twin])[0])
    of_weight, of_bias = (sum(gradients(expected, list(p))) for p in zip(*parameters, strict=True))
    all_close(gradients(y, [layer.weight, layer.bias]), [of_weight, of_bias])


def test_micro_batches_average_what_they_normalize_by():
    """σ is σ_B in expectation, so r is 1 on average; of the whole batch's σ it would be 0.82 in groups of 4."""
    layer = dn.BatchRenorm(1, momentum=0.02, samples_per_group=4, r_max=1e9, d_max=1e9, affine=None).double()
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for step in range(600):
        x = torch.randn(64, 1, generator=generator, dtype=torch.float64)
        deviation = x.view(16, 4).var(1, correction=0).sqrt()
        if step > 300:
            ratios.append((deviation / (layer.running_var + layer.eps).sqrt()).mean())
        layer(x)
    assert abs(torch.stack(ratios).mean() - 1) < 0.01


@pytest.mark.parametrize("sgd", ["shared", "per_domain"])
def test_micro_batches_of_several_domains(sgd):
    """Each domain averages the σ of the groups that its samples are in, by their elements."""
    options = {"num_domains": 2, "sgd_statistics": sgd, "samples_per_group": 2, "momentum": 1.0}
    xs = [random_input(4, C, 3), random_input(5, C, 3, seed=1)]
    parts = [x.detach().split(2) for x in xs]
    if sgd == "shared":  # the g-th groups of both domains are one
        groups = [torch.cat([own[g] for own in parts if g < len(own)]) for g in range(3)]
        of_domain = [[(groups[g], len(part)) for g, part in enumerate(own)] for own in parts]
    else:
        of_domain = [[(part, len(part)) for part in own] for own in parts]
    one = renorm(**options)
    one(xs)
    mixed = renorm(**options)
    mixed(torch.cat(xs), domain=torch.tensor([0] * 4 + [1] * 5))
    for k, own in enumerate(of_domain):
        total = sum(number for _, number in own)
        sigma = sum(n / total * (x.transpose(0, 1).flatten(1).var(1, correction=0) + one.eps).sqrt() for x, n in own)
        for layer in (one, mixed):
            close((layer.running_var[k] + layer.eps).sqrt(), sigma)


def test_micro_batches_and_the_average_of_squares():
    layer = dn.BatchRenorm(C, samples_per_group=2, track_total_var=True, momentum=1.0, dtype=torch.float64)
    x = random_input(8, C, 3).detach() * 3
    layer(x)
    close(layer.running_total_var, x.transpose(0, 1).flatten(1).var(1, correction=0))


def test_a_micro_batch_larger_than_the_batch_is_refused():
    layer = renorm(samples_per_group=7)
    with pytest.raises(ValueError, match=r"7.*5|5.*7"):
        layer(random_input(5, C, 3))
    assert layer.num_batches_tracked == 0


def test_micro_batches_of_one_element_are_refused():
    with pytest.raises(ValueError, match="more than 1 value"):
        renorm(samples_per_group=1)(random_input(4, C))


# ---- domains, ranks ------------------------------------------------------------------------------------------------


def test_each_domain_has_its_own_step():
    layer = renorm(num_domains=2, **POINTS)
    alone = [with_affine_of(layer, renorm(**POINTS)) for _ in range(2)]
    for step, k in enumerate((0, 0, 1, 0, 1, 0, 0)):
        x = random_input(4, C, 3, seed=step) * 2
        close(layer(x, domain=k), alone[k](x))
    assert layer.num_batches_tracked.tolist() == [5, 2]
    for k in range(2):
        close(layer.running_mean[k], alone[k].running_mean)
        close(layer.running_var[k], alone[k].running_var)


def test_shared_statistics_of_domains_are_those_of_the_concatenation():
    layer, plain = (
        renorm(num_domains=2, sgd_statistics="shared", population_statistics="shared", **TIGHT),
        renorm(**TIGHT),
    )
    with_affine_of(layer, plain)
    for step in range(3):
        xs = [random_input(n, C, 2, 3, seed=step + n) for n in (2, 3)]
        whole = torch.cat(xs).detach().requires_grad_()
        y, expected = torch.cat(layer(xs)), plain(whole)
        close(y, expected)
        close(torch.cat(gradients(y, xs)), gradients(expected, [whole])[0])
    for name, value in plain.named_buffers():
        close(layer.get_buffer(name), value)


PATTERNS = [(3, 2), (4, 0)]


def ranks_input(pattern):
    return [random_input(max(n, 1), C, 2, 3, seed=r)[:n].detach().requires_grad_() for r, n in enumerate(pattern)]


def run_steps(layer, x):
    for _ in range(2):
        y = layer(x)
    y.pow(3).sum().backward()
    return y.detach(), x.grad, layer.weight.grad, dict(layer.named_buffers())


def synchronized(rank):
    results = []
    for pattern in PATTERNS:
        torch.manual_seed(0)
        results.append(run_steps(renorm(sync=True, **TIGHT), ranks_input(pattern)[rank]))
    return results


def test_two_processes_in_sync_are_one():
    ranks = run_ranks(synchronized, 2)
    for pattern, results in zip(PATTERNS, zip(*ranks, strict=True), strict=True):
        torch.manual_seed(0)
        y, grad, weight, expected = run_steps(
            renorm(**TIGHT), torch.cat(ranks_input(pattern)).detach().requires_grad_()
        )
        outputs, grads, weights, buffers = zip(*results, strict=True)
        all_close([torch.cat(outputs), torch.cat(grads), sum(weights)], [y, grad, weight])
        for of_rank in buffers:
            for name, value in expected.items():
                close(of_rank[name], value)


def test_a_raising_forward_leaves_the_buffers():
    layer, reference = renorm(), RenormReference(C)
    check_step(layer, reference, random_input(4, C, 3))
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(random_input(1, C))
    check_buffers(layer, reference)
