"""What an audit measures equals what one computes by hand, and the model is left as it was."""

import copy

import pytest
import torch
from norm_cases import KINDS, make, random_input
from ranks import run_ranks
from torch import nn
from torch.distributions import Normal, kl_divergence
from torchvision.ops import FrozenBatchNorm2d

import domainnorm as dn
from domainnorm.auditing.divergence import alike, divergence, inconsistency, pairwise, ranges
from domainnorm.auditing.norms import find_norms
from domainnorm.auditing.observe import Observer
from domainnorm.auditing.padding import Padding


def batches(number=4, size=16, channels=3, side=12, shift=0.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(size, channels, side, side, generator=generator, dtype=dtype) + shift for _ in range(number)]


def net(norm, last=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, last, 3))


def trained(model, inputs):
    """With running statistics of these inputs."""
    with torch.no_grad():
        for x in inputs:
            model.train()(x)
    return model


def audit(model, inputs, **options):
    return dn.audit(model, inputs, progress=False, **options)


def kl_by_hand(x, mean, var, eps=1e-5):
    """Of the elements of `x` (N, C, …), by torch's own formula; the mean over channels."""
    own = x.double().transpose(0, 1).flatten(1)
    one = Normal(own.mean(1), (own.var(1, correction=0) + eps).sqrt())
    return float(kl_divergence(one, Normal(mean.double(), (var.double() + eps).sqrt())).mean())


def test_divergence_is_that_of_normal_distributions():
    mean, var = torch.randn(2, 5, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64) + 0.1
    expected = kl_divergence(Normal(mean[0], var[0].sqrt()), Normal(mean[1], var[1].sqrt()))
    torch.testing.assert_close(divergence(mean[0], var[0], mean[1], var[1], eps=0.0), expected)
    both = pairwise(mean, var, 0.0)
    reverse = kl_divergence(Normal(mean[1], var[1].sqrt()), Normal(mean[0], var[0].sqrt()))
    torch.testing.assert_close(both[0, 1], (expected + reverse).mean() / 2)


def test_inconsistency_is_the_change_of_normalized_values():
    x = torch.randn(100_000, dtype=torch.float64) * 3 + 1
    mean, var = x.mean(), x.var(correction=0)
    change = ((x - mean) / var.sqrt() - (x - 2) / 2.0).square().mean()
    torch.testing.assert_close(inconsistency(mean, var, torch.tensor(2.0), torch.tensor(4.0), 0.0), change)


def test_groups_that_are_alike():
    places = torch.tensor([0.0, 0.1, 5.0, 5.05, 9.0])
    distances = (places[:, None] - places).abs()
    assert alike(distances, 0.2) == [[0, 1], [2, 3], [4]]
    assert alike(distances, 20) == [[0, 1, 2, 3, 4]] and alike(distances, 0.01) == [[0], [1], [2], [3], [4]]
    assert ranges([0, 1, 2, 5]) == "0-2, 5"


def test_the_figures_of_a_layer():
    inputs = batches()
    model = trained(net(nn.BatchNorm2d(8)), inputs)
    report = audit(model, inputs)
    (row,) = report.layers
    features = model[0](torch.cat(inputs)).detach()
    expected = kl_by_hand(features, model[1].running_mean, model[1].running_var)
    assert row["divergence"] == pytest.approx(expected, rel=1e-4) == row["inference"]
    one, other = model.eval()(inputs[0]).detach(), model.train()(inputs[0]).detach()
    single = audit(model.eval(), inputs[:1])
    change = ((one - other).square().sum() / one.square().sum()).sqrt()
    assert single.output_change != 0 and (row["layer"], row["call"], row["samples"]) == ("1", 0, 16)
    # the running statistics have moved by the forward pass in training mode: measure again
    again = trained(net(nn.BatchNorm2d(8)), inputs)
    assert audit(again, inputs[:1]).output_change == pytest.approx(float(change), rel=1e-4)


def test_a_layer_is_not_blamed_for_those_before_it():
    """Its own divergence is measured as in training; that in inference has the errors of the layers before it."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    trained(model, batches(60))
    model[0].running_mean += 3
    first, second = audit(model, batches()).layers
    assert first["divergence"] > 4 and first["inference"] == pytest.approx(first["divergence"])
    assert second["divergence"] < 0.02 < 1 < second["inference"]


def test_each_call_is_told_apart():
    class Levels(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            levels = [x, 3 * x[..., ::2, ::2] + 1]
            return self.norm(levels) if isinstance(self.norm, dn.DomainBatchNorm) else [self.norm(y) for y in levels]

    inputs = batches()
    torchs = trained(Levels(nn.BatchNorm2d(3)), inputs)
    ours = Levels(dn.DomainBatchNorm(3, num_domains=2, population_statistics="shared"))
    trained(ours, inputs)
    one, other = audit(torchs, inputs).layers, audit(ours, inputs).layers
    assert [row["call"] for row in one] == [0, 1] and [row["domain"] for row in other] == [0, 1]
    for a, b in zip(one, other, strict=True):
        assert a["divergence"] == pytest.approx(b["divergence"], rel=1e-3)
        assert a["elements"] == b["elements"] and a["alone"] == pytest.approx(b["alone"], rel=1e-3)


def test_images_that_a_model_takes_one_by_one():
    class OneByOne(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return torch.cat([self.model(image[None]) for image in x])

    inputs = batches()
    model = trained(net(nn.BatchNorm2d(8)), inputs)
    (together,), (apart,) = audit(model, inputs).layers, audit(OneByOne(model), inputs).layers
    assert apart["call"] == 0 and apart["samples"] == together["samples"]
    assert apart["divergence"] == pytest.approx(together["divergence"])


@pytest.mark.parametrize("kind", KINDS)
def test_minibatch_statistics_are_those_of_training(kind):
    layer = make(kind).train()
    x = random_input(6, 4, 5, 5)
    if kind == "renorm":
        layer.is_corrected = False  # which is not measured
    expected = copy.deepcopy(layer)(x)
    layer.eval()
    observer = Observer(find_norms(nn.Sequential(layer)))
    buffers = copy.deepcopy(layer.state_dict())
    with observer.attached(), observer.by_minibatch([0]):
        torch.testing.assert_close(layer(x), expected)
    assert all(torch.equal(value, buffers[key]) for key, value in layer.state_dict().items())
    (call,) = observer.calls
    torch.testing.assert_close(call.rows.merge(0).mean, layer.moments_of_domains(_input(x)).mean)


def _input(x):
    from domainnorm.layers.inputs import LayerInput

    return LayerInput.of(x, None, 1, x.shape[1])


def test_frozen_layers_are_not_switched():
    model = trained(net(nn.BatchNorm2d(8)), batches())
    dn.freeze_batchnorm(model)
    assert audit(model, batches()).output_change == 0
    frozen = net(FrozenBatchNorm2d(8))
    report = audit(frozen, batches())
    assert report.layers[0]["frozen"] and report.output_change == 0 and report.norms == 1


class Counting(nn.Module):
    def __init__(self, model, fails_at=None):
        super().__init__()
        self.model, self.samples, self.fails_at = model, [], fails_at

    def forward(self, x):
        self.samples.append(len(x))
        if len(self.samples) == self.fails_at:
            raise RuntimeError("broken")
        return self.model(x)


def state(model):
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return tensors, [m.training for m in model.modules()], hooks


def assert_same(model, before):
    tensors, modes, hooks = state(model)
    assert (modes, hooks) == before[1:]
    for name, value in before[0].items():
        assert torch.equal(tensors[name], value), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build_norm", [nn.BatchNorm2d, dn.DomainBatchNorm, dn.BatchRenorm, FrozenBatchNorm2d])
def test_the_model_is_left_as_it_was(build_norm, training):
    model = Counting(trained(net(build_norm(8)), batches(2))).train(training)
    model.model[1].running_mean.add_(2)  # so that there is something to find
    before, random = state(model), torch.get_rng_state()
    report = audit(model, iter(batches()))
    assert report.findings and report.samples == 64 and report.batches == 4
    assert_same(model, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert sum(model.samples) <= 3 * 64


@pytest.mark.parametrize("fails_at", [1, 2, 3, 9])
def test_an_error_changes_nothing(fails_at):
    model = Counting(trained(net(nn.BatchNorm2d(8)), batches(2)), fails_at).train()
    model.model[1].running_mean.add_(2)
    before = state(model)
    with pytest.raises(RuntimeError, match="broken"):
        audit(model, batches())
    assert_same(model, before)


def test_what_cannot_be_audited():
    with pytest.raises(ValueError, match="there is no batch"):
        audit(net(nn.BatchNorm2d(8)), [])
    with pytest.raises(ValueError, match="1 has no shape yet: run the model on one batch"):
        audit(net(nn.LazyBatchNorm2d()), batches())
    with pytest.raises(ValueError, match="TorchScript"):
        audit(torch.jit.script(net(nn.BatchNorm2d(8))), batches())
    report = audit(net(nn.GroupNorm(2, 8)), batches())
    assert report.norms == 0 and report.findings == [] and report.healthy


def test_layers_that_no_batch_reaches():
    model = trained(net(nn.BatchNorm2d(8)), batches())
    model.spare = nn.Sequential(nn.BatchNorm2d(4))
    model.forward = lambda x: nn.Sequential(*list(model.children())[:4])(x)
    assert audit(model, batches()).not_reached == ["spare.0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = trained(net(nn.BatchNorm2d(8)), batches(60))
    (expected,) = audit(model, batches()).layers
    (row,) = audit(copy.deepcopy(model).to(dtype), [x.to(dtype) for x in batches()]).layers
    assert row["divergence"] == pytest.approx(expected["divergence"], abs=1e-3)


def test_padding_is_left_out():
    images = torch.randn(2, 3, 8, 10)
    images[0, :, 5:] = 0
    images[0, :, :, 6:] = 0
    padding = Padding.of(images)
    assert padding.sizes == [(5, 6), (8, 10)] and padding.share == pytest.approx(1 - (30 + 80) / 160)
    moments, share = padding.moments(images)
    assert share == pytest.approx(padding.share)
    torch.testing.assert_close(moments.mean[0], images[0, :, :5, :6].double().mean((1, 2)))
    torch.testing.assert_close(moments.var[1], images[1].double().var((1, 2), correction=0))
    assert moments.count.flatten().tolist() == [30, 80]
    small, _ = padding.moments(torch.randn(2, 4, 4, 5))
    assert small.count.flatten().tolist() == [3 * 3, 4 * 5]
    assert padding.moments(torch.randn(7, 4, 4, 5)) == (None, 0.0)  # of something else than these images
    assert Padding.of(torch.randn(2, 3, 8, 8)) is None
    digits = torch.zeros(4, 1, 28, 28)
    digits[:, :, 4:24, 4:24] = 1
    assert Padding.of(digits) is None  # black on all sides


def _on_ranks(rank):
    model = trained(net(nn.BatchNorm2d(8)), batches(60))
    equal = audit(model, batches(2))
    if rank:
        model[1].running_mean += 0.001
    report = audit(model, batches(2, size=16 if rank else 2))
    return [f.kind for f in equal.findings], {f.kind: f.layers for f in report.findings}


def test_ranks_are_compared():
    for equal, uneven in run_ranks(_on_ranks, 2):
        assert equal == []
        assert uneven["ranks differ"] == ["1"] and "batches of ranks differ" in uneven
