"""SeqNorm: GroupNorm without affine, GhostBN, one affine."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import C, build, check_same_step, check_step, check_steps, close, random_input, with_affine_of
from reference_norms import SeqReference, ghost_sizes
from torch import nn

import domainnorm as dn


def seq(num_channel_groups=2, num_sample_groups=2, channels=C, **options):
    return build(
        "SeqNorm", channels, num_channel_groups=num_channel_groups, num_sample_groups=num_sample_groups, **options
    )


class Composed(nn.Module):
    """The two layers one after the other."""

    def __init__(self, num_channel_groups, second, eps=1e-5):
        super().__init__()
        self.first = nn.GroupNorm(num_channel_groups, C, eps, affine=False)
        self.second = second

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("shape", [(6, C), (5, C, 3), (5, C, 2, 3), (4, C, 2, 1, 2)])
@pytest.mark.parametrize("num_channel_groups", [1, 2])
def test_steps(shape, num_channel_groups):
    check_steps(seq(num_channel_groups), SeqReference(C, num_channel_groups, 2), *shape)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(2, 6),
    num_sample_groups=st.integers(1, 6),
    num_channel_groups=st.sampled_from([1, 2, 3, 6]),
    spatial=st.sampled_from([(2,), (3,), (2, 2), (1, 2, 2)]),
)
def test_any_partition(n, num_sample_groups, num_channel_groups, spatial):
    layer, x = seq(num_channel_groups, num_sample_groups, channels=6), random_input(n, 6, *spatial)
    if num_sample_groups > n:
        with pytest.raises(ValueError, match=rf"{num_sample_groups}.*{n}|{n}.*{num_sample_groups}"):
            layer(x)
    else:
        check_step(layer, SeqReference(6, num_channel_groups, num_sample_groups), x)


@pytest.mark.parametrize("eps", [1e-5, 1e-1])
def test_one_batch_group_is_batch_norm_of_group_norm(eps):
    """Also at a large eps: it is in both stages."""
    layer = seq(2, 1, eps=eps)
    plain = with_affine_of(layer, nn.BatchNorm2d(C, eps, dtype=torch.float64))
    composed = Composed(2, plain, eps)
    for step in range(3):
        check_same_step(layer, composed, random_input(4, C, 3, 2, seed=step), buffers=False)
        for name, value in plain.named_buffers():
            close(layer.get_buffer(name), value)
    check_same_step(layer.eval(), composed.eval(), random_input(1, C, 2, 5, seed=5), buffers=False)


@pytest.mark.parametrize("statistics", ["auto", "minibatch"])
def test_it_is_ghost_batch_norm_of_group_norm(statistics):
    layer = seq(2, 3)
    ghost = with_affine_of(layer, dn.GhostBatchNorm(C, num_sample_groups=3, dtype=torch.float64))
    composed = Composed(2, ghost)
    layer.statistics = ghost.statistics = statistics
    for step in range(2):
        check_same_step(layer, composed, random_input(5, C, 3, 2, seed=step), buffers=False)
    for name, value in ghost.named_buffers():
        close(layer.get_buffer(name), value)
    check_same_step(layer.eval(), composed.eval(), random_input(2, C, 2, 5, seed=5), buffers=False)


def test_one_channel_a_group_is_instance_norm_rescaled_by_group():
    """Rows then have mean 0 and variance v / (v + eps), so a group of samples only shares a scale near 1."""
    eps = 0.1
    layer, x = seq(C, 2, eps=eps), random_input(5, C, 3, 2)
    var = x.var((2, 3), correction=0)
    left = var / (var + eps)
    scale = torch.cat([g.mean(0, keepdim=True).expand_as(g) for g in left.split(ghost_sizes(5, 3, 6))])
    instance = nn.functional.instance_norm(x, eps=eps)
    expected = instance / (scale + eps).sqrt()[:, :, None, None]
    close(layer(x), expected * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1))
    close(layer.running_mean, torch.zeros(C, dtype=torch.float64))


def test_one_channel_a_group_at_a_tiny_eps_is_instance_norm():
    layer, x = seq(C, 2, eps=1e-12), random_input(5, C, 3, 2)
    close(layer(x), nn.functional.instance_norm(x, weight=layer.weight, bias=layer.bias, eps=1e-12))


def test_inference_still_normalizes_by_the_sample():
    """A sample's scale and offset leave no trace; other samples neither."""
    layer = seq(1, 2, eps=1e-12)
    layer(random_input(4, C, 3))
    layer.eval()
    x = random_input(3, C, 3, seed=7).detach()
    close(layer(x * 3 + 5), layer(x))
    close(layer(x)[1:2], layer(x[1:2]))


@pytest.mark.parametrize(
    "options",
    [
        {"num_channel_groups": 3, "num_sample_groups": 2},
        {"num_channel_groups": 0, "num_sample_groups": 2},
        {"num_channel_groups": 8, "num_sample_groups": 2},
    ],
)
def test_channel_groups_divide_the_channels(options):
    with pytest.raises(ValueError, match=rf"{options['num_channel_groups']}") as error:
        dn.SeqNorm(C, **options)
    assert "num_channel_groups" in str(error.value) and str(C) in str(error.value)


def test_batch_groups_are_positive():
    with pytest.raises(ValueError, match=r"num_sample_groups.*0"):
        dn.SeqNorm(C, num_channel_groups=2, num_sample_groups=0)
