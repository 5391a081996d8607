"""Batch Group Norm: all samples, one of G equal pieces of the flattened C·H·W."""

import copy
import pickle

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
    close,
    gradients,
    random_input,
    with_affine_of,
)
from ranks import run_ranks
from reference_norms import BatchGroupReference
from torch import nn

import domainnorm as dn


def bgn(num_groups, channels=C, **options):
    return build("BatchGroupNorm", channels, num_groups=num_groups, **options)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("shape", [(6, C), (5, C, 3), (5, C, 2, 3), (3, C, 2, 1, 2)])
def test_steps_with_whole_channels(shape, num_groups):
    check_steps(bgn(num_groups), BatchGroupReference(C, num_groups), *shape)


@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((3, 4, 6), 8),  # half a channel each
        ((3, 4, 2, 3), 12),  # two rows of width 3 in thirds
        ((2, 4, 2, 3), 24),  # one position of a feature map each: over the samples only
        ((3, 4, 2, 3), 3),  # a channel and a third: channels are cut
        ((3, 4, 3, 3), 6),  # two thirds of a channel
        ((3, 6, 2, 2), 4),  # a channel and a half
        ((3, 4, 2, 3, 1), 8),
    ],
)
def test_steps_with_pieces_of_channels(shape, num_groups):
    channels = shape[1]
    check_steps(bgn(num_groups, channels), BatchGroupReference(channels, num_groups), *shape)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_piece(data):
    channels = data.draw(st.integers(1, 6), "channels")
    spatial = data.draw(st.sampled_from([(1,), (4,), (2, 3), (3, 2), (2, 2, 1)]), "spatial")
    features = channels * torch.Size(spatial).numel()
    groups = data.draw(st.sampled_from([g for g in range(1, features + 1) if features % g == 0]), "groups")
    layer, x = bgn(groups, channels), random_input(3, channels, *spatial)
    assert layer.running_mean.shape == layer.running_var.shape == (groups,)
    check_step(layer, BatchGroupReference(channels, groups), x)
    check_step(layer.eval(), reference_of(layer), x)


def reference_of(layer):
    """A reference that continues from the layer's buffers."""
    reference = BatchGroupReference(layer.num_features, len(layer.running_mean))
    reference.mean, reference.var = layer.running_mean.clone(), layer.running_var.clone()
    reference.steps = layer.num_batches_tracked.item()
    return reference


@pytest.mark.parametrize("momentum", [0.1, None])
def test_as_many_groups_as_channels_is_batch_norm(momentum):
    layer = bgn(C, momentum=momentum)
    plain = with_affine_of(layer, nn.BatchNorm2d(C, momentum=momentum, dtype=torch.float64))
    for step in range(3):
        check_same_step(layer, plain, random_input(4, C, 3, 2, seed=step))
    check_same_step(layer.eval(), plain.eval(), random_input(2, C, 2, 4, seed=5))


def test_one_group_normalizes_everything_together():
    x = random_input(3, C, 3, 2)
    y = bgn(1, affine=None)(x)
    close(y, (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt())


def test_one_sample_is_group_norm():
    x = random_input(1, C, 3, 2)
    layer = bgn(2)
    plain = with_affine_of(layer, nn.GroupNorm(2, C, dtype=torch.float64))
    check_same_step(layer, plain, x, buffers=False)


def test_the_memory_format_does_not_change_the_pieces():
    """Pieces are of C·H·W, in this order, whatever the strides."""
    x = random_input(3, C, 2, 3).detach()
    strided = x.to(memory_format=torch.channels_last)
    assert strided.stride() != x.stride()
    for groups in (3, 8, 12):
        close(bgn(groups, affine=None)(strided), bgn(groups, affine=None)(x))


def test_whole_channels_work_at_any_size():
    layer = bgn(2)
    for shape in ((2, C, 3, 3), (2, C, 5), (3, C, 2, 4)):
        assert layer(random_input(*shape)).shape == shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("num_groups", "channels"), [(8, 4), (9, 6)])
def test_pieces_of_channels_work_at_one_size_only(num_groups, channels, training):
    layer = bgn(num_groups, channels)
    layer(random_input(2, channels, 4, 6))
    before = copy.deepcopy(layer.state_dict())
    layer.train(training)
    with pytest.raises(ValueError, match="size"):
        layer(random_input(2, channels, 8, 6))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer(random_input(3, channels, 4, 6))


@pytest.mark.parametrize(("num_groups", "channels"), [(3, 4), (4, 6)])
def test_pieces_of_a_channel_and_more_work_at_any_size(num_groups, channels):
    """A piece is the same part of the channels at every size: one checkpoint infers at all of them."""
    layer, reference = bgn(num_groups, channels), BatchGroupReference(channels, num_groups=num_groups)
    for shape in ((4, 6), (8, 6), (6, 2)):
        x = random_input(5, channels, *shape)
        close(layer(x), reference.train(x, layer.weight, layer.bias))
    again = bgn(num_groups, channels).eval()
    again.load_state_dict(layer.state_dict())
    for shape in ((4, 6), (8, 12)):
        x = random_input(2, channels, *shape)
        close(again(x), reference.infer(x, layer.weight, layer.bias))
    with pytest.raises(ValueError, match=r"tensors of a list have one feature size: expected \(4, 6\)"):
        bgn(num_groups, channels, num_domains=2)([x[..., :4, :6], x[..., :8, :6]])


def test_exact_statistics_and_conversions_know_the_size():
    model = nn.Sequential(bgn(8))
    x = random_input(2, C, 4, 6).detach()
    dn.recompute_population_statistics(model, [x], method="exact", progress=False)
    assert dn.convert_batchnorm(model, "BGN", num_groups=8)[0].feature_size == (4, 6)
    with pytest.raises(ValueError, match="size"):
        model.eval()(random_input(2, C, 8, 6))


def test_an_empty_input_does_not_fix_the_size():
    layer = bgn(8)
    layer(random_input(0, C, 1, 2))
    layer(random_input(3, C, 4, 6))


def test_a_refused_input_does_not_fix_the_size():
    layer = bgn(8)
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(random_input(1, C, 2))  # pieces of one element
    layer(random_input(3, C, 4, 6))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_works_at_the_same_size_only(copied):
    layer = bgn(8)
    layer(random_input(2, C, 2, 2))
    twin = copied(layer).eval()
    twin(random_input(2, C, 2, 2))
    with pytest.raises(ValueError, match="size"):
        twin(random_input(2, C, 4, 2))


@pytest.mark.parametrize(
    ("num_groups", "shape", "divisors"),
    [(5, (2, 4, 3, 3), (4, 6)), (7, (2, 4, 3, 3), (6, 9)), (37, (2, 4, 3, 3), (36,)), (3, (2, 4), (2, 4))],
)
def test_groups_divide_the_features(num_groups, shape, divisors):
    features = torch.Size(shape[1:]).numel()
    for training in (True, False):
        with pytest.raises(ValueError, match=rf"\b{num_groups}\b") as error:
            bgn(num_groups).train(training)(random_input(*shape))
        words = str(error.value)
        for number in (features, *divisors):
            assert f"{number}" in words, f"{number} is not in: {words}"


@pytest.mark.parametrize("num_groups", [0, -2])
def test_groups_are_positive(num_groups):
    with pytest.raises(ValueError, match=rf"num_groups.*{num_groups}"):
        dn.BatchGroupNorm(C, num_groups=num_groups)


def test_domains_of_one_size_with_pieces_of_channels():
    layer = bgn(8, num_domains=2)
    xs = [random_input(3, C, 2, 2, seed=k) for k in range(2)]
    assert layer.running_mean.shape == (2, 8)
    for k, y in enumerate(layer(xs)):
        alone = with_affine_of(layer, bgn(8))
        close(y, alone(xs[k]))
        close(layer.running_var[k], alone.running_var)


def test_shared_statistics_of_domains_are_those_of_the_concatenation():
    layer, plain = bgn(2, num_domains=2, sgd_statistics="shared", population_statistics="shared"), bgn(2)
    with_affine_of(layer, plain)
    for step in range(2):
        xs = [random_input(n, C, 2, 3, seed=step + n) for n in (2, 3)]
        whole = torch.cat(xs).detach().requires_grad_()
        y, expected = torch.cat(layer(xs)), plain(whole)
        close(y, expected)
        close(torch.cat(gradients(y, xs)), gradients(expected, [whole])[0])
    for name, value in plain.named_buffers():
        close(layer.get_buffer(name), value)


# ---- over ranks ----------------------------------------------------------------------------------------------------


def ranks_input(pattern):
    return [random_input(max(n, 1), C, 2, 3, seed=r)[:n].detach().requires_grad_() for r, n in enumerate(pattern)]


def synchronized(rank, patterns, num_groups):
    results = []
    for pattern in patterns:
        torch.manual_seed(0)
        layer, x = bgn(num_groups, sync=True), ranks_input(pattern)[rank]
        y = layer(x)
        (y.pow(3)).sum().backward()
        results.append((y.detach(), x.grad, layer.weight.grad, dict(layer.named_buffers())))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("num_groups", [2, 8])
def test_two_processes_in_sync_are_one(num_groups):
    patterns = [(3, 2), (4, 0)]
    ranks = run_ranks(synchronized, 2, patterns, num_groups)
    for pattern, results in zip(patterns, zip(*ranks, strict=True), strict=True):
        torch.manual_seed(0)
        layer, x = bgn(num_groups), torch.cat(ranks_input(pattern)).detach().requires_grad_()
        y = layer(x)
        y.pow(3).sum().backward()
        outputs, grads, weights, buffers = zip(*results, strict=True)
        all_close([torch.cat(outputs), torch.cat(grads)], [y.detach(), x.grad])
        close(sum(weights), layer.weight.grad)
        for of_rank in buffers:
            for name, value in layer.named_buffers():
                close(of_rank[name], value)


def test_gradients_of_the_whole_flattened_map():
    """Every piece's output has mean 0, so a constant cotangent on a piece gives no gradient."""
    layer, x = bgn(6, affine=None), random_input(3, C, 3, 1)
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    close(grad, torch.zeros_like(grad))
    assert gradients(layer(x), [x])[0].abs().min() > 0
