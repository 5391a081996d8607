"""GBGN: statistics over groups of examples and groups of channels (Four Things, §3.4)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import C, build, check_same_step, check_step, check_steps, close, random_input, with_affine_of
from reference_norms import GroupedReference, Reference
from torch import nn

import domainnorm as dn


def gbgn(num_channel_groups, samples_per_group, channels=C, **options):
    return build(
        "GroupedBatchNorm",
        channels,
        num_channel_groups=num_channel_groups,
        samples_per_group=samples_per_group,
        **options,
    )


@pytest.mark.parametrize("shape", [(6, C), (5, C, 3), (5, C, 2, 3), (4, C, 2, 1, 2)])
@pytest.mark.parametrize(("num_channel_groups", "examples"), [(1, 2), (2, 3), (2, 1)])
def test_steps(shape, num_channel_groups, examples):
    check_steps(gbgn(num_channel_groups, examples), GroupedReference(C, num_channel_groups, examples), *shape)


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 6),
    examples=st.integers(1, 4),
    num_channel_groups=st.sampled_from([1, 2, 3, 6]),
    spatial=st.sampled_from([(2,), (3,), (2, 2), (1, 2, 2)]),
)
def test_any_partition(n, examples, num_channel_groups, spatial):
    """The last group, or the only one, may have fewer examples."""
    layer, x = gbgn(num_channel_groups, examples, channels=6), random_input(n, 6, *spatial)
    check_step(layer, GroupedReference(6, num_channel_groups, examples), x)


def test_one_example_a_group_is_group_norm():
    layer = gbgn(2, 1)
    plain = with_affine_of(layer, nn.GroupNorm(2, C, dtype=torch.float64))
    for shape in ((5, C), (3, C, 4), (3, C, 2, 3)):
        check_same_step(layer, plain, random_input(*shape), buffers=False)


def test_one_channel_a_group_is_ghost_batch_norm():
    layer = gbgn(C, 2)
    ghost = with_affine_of(layer, dn.GhostBatchNorm(C, samples_per_group=2, dtype=torch.float64))
    for step in range(3):
        check_same_step(layer, ghost, random_input(5, C, 3, seed=step))
    check_same_step(layer.eval(), ghost.eval(), random_input(2, C, 4, seed=9))


def test_all_examples_and_one_channel_group_is_everything_together():
    x = random_input(3, C, 2)
    close(gbgn(1, 3, affine=None)(x), (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt())


def test_population_statistics_are_per_channel_as_batch_norm():
    layer, plain = gbgn(2, 2), Reference(C)
    for step in range(3):
        x = random_input(5, C, 3, seed=step)
        layer(x)
        plain.update(x.detach())
    close(layer.running_mean, plain.mean)
    close(layer.running_var, plain.var)
    assert layer.running_mean.shape == (C,)


def test_inference_merges_the_channels_of_a_group():
    """By hand: channels (0, 1) and (2, 3), counts equal."""
    layer = gbgn(2, 2, affine=None).eval()
    layer.running_mean.copy_(torch.tensor([1.0, 3.0, -2.0, 2.0]))
    layer.running_var.copy_(torch.tensor([2.0, 4.0, 1.0, 1.0]))
    mean = torch.tensor([2.0, 2.0, 0.0, 0.0], dtype=torch.float64).view(1, C, 1)
    var = torch.tensor([3.0 + 1, 3.0 + 1, 1.0 + 4, 1.0 + 4], dtype=torch.float64).view(1, C, 1)
    x = random_input(3, C, 5)
    close(layer(x), (x - mean) / (var + 1e-5).sqrt())


# ---- the released layer of Four Things -----------------------------------------------------------------------------


def released_training(x, num_channel_groups, samples_per_group, weight, bias, eps=1e-5):
    """From E[x] and E[x²] of rows, averaged over a group; no more examples in a group than there are."""
    n, c = x.shape[:2]
    examples = min(samples_per_group, n)
    first, second = x.flatten(2).mean(2), x.flatten(2).square().mean(2)
    grouped = (n // examples, examples, num_channel_groups, c // num_channel_groups)
    mean, square = (v.view(grouped).mean((1, 3), keepdim=True) for v in (first, second))
    return from_moments(x, mean.expand(grouped), square.expand(grouped), weight, bias, eps)


def released_inference(x, num_channel_groups, alpha, moving_x, moving_x2, weight, bias, eps=1e-5):
    """Moving averages of E[x] and E[x²] averaged over a channel group, mixed with those of the sample."""
    n, c = x.shape[:2]
    first, second = x.flatten(2).mean(2), x.flatten(2).square().mean(2)
    grouped = (n, num_channel_groups, c // num_channel_groups)
    mixed = []
    for own, moving in ((first, moving_x), (second, moving_x2)):
        own = own.view(grouped).mean(2, keepdim=True)
        moving = moving.view(1, *grouped[1:]).mean(2, keepdim=True)
        mixed.append((alpha * own + (1 - alpha) * moving).expand(grouped))
    return from_moments(x, *mixed, weight, bias, eps)


def from_moments(x, mean, square, weight, bias, eps):
    rows = (*x.shape[:2], *[1] * (x.ndim - 2))
    scale = (square - mean.square() + eps).rsqrt().reshape(x.shape[:2]) * weight
    return x * scale.view(rows) + (bias - mean.reshape(x.shape[:2]) * scale).view(rows)


@pytest.mark.parametrize(
    ("n", "num_channel_groups", "examples"), [(6, 2, 2), (6, 1, 3), (4, C, 4), (4, 2, 1), (3, 2, 8), (1, 2, 2)]
)
def test_training_as_the_released_layer(n, num_channel_groups, examples):
    """A batch smaller than a group is one group."""
    layer, x = gbgn(num_channel_groups, examples), random_input(n, C, 3, 2)
    close(layer(x), released_training(x, num_channel_groups, examples, layer.weight, layer.bias))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("num_channel_groups", [1, 2, C])
def test_inference_as_the_released_layer(num_channel_groups, alpha):
    layer = gbgn(num_channel_groups, 2)
    for step in range(3):
        layer(random_input(4, C, 3, 2, seed=step))
    layer.eval().example_weight = alpha
    x = random_input(3, C, 3, 2, seed=7)
    square = layer.running_var + layer.running_mean.square()
    close(
        layer(x), released_inference(x, num_channel_groups, alpha, layer.running_mean, square, layer.weight, layer.bias)
    )


# ---- edges ---------------------------------------------------------------------------------------------------------


def test_one_sample_without_spatial_sizes_keeps_the_buffers_finite():
    """Its normalization batch has two elements, its channels have one and no variance."""
    layer = gbgn(2, 2)
    assert layer(random_input(1, C)).isfinite().all()
    assert layer.running_mean.isfinite().all() and layer.running_var.isfinite().all()
    close(layer.running_var, torch.ones(C, dtype=torch.float64))


@pytest.mark.parametrize("num_channel_groups", [3, 0, 8, -1])
def test_channel_groups_divide_the_channels(num_channel_groups):
    with pytest.raises(ValueError, match=rf"{num_channel_groups}") as error:
        dn.GroupedBatchNorm(C, num_channel_groups=num_channel_groups, samples_per_group=2)
    assert "num_channel_groups" in str(error.value) and str(C) in str(error.value)


def test_examples_per_group_are_positive():
    with pytest.raises(ValueError, match=r"samples_per_group.*0"):
        dn.GroupedBatchNorm(C, num_channel_groups=2, samples_per_group=0)
