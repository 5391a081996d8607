"""Recomputed population statistics: the truth about all batches, whatever the model does with its layers."""

import copy
import threading
from typing import NamedTuple

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import nn

import domainnorm as dn
from domainnorm.statistics.batches import batch_size, regrouped
from domainnorm.statistics.lockstep import OutOfStepError
from domainnorm.statistics.recompute import METHODS

recompute = dn.recompute_population_statistics


def quiet(model, batches, method="pooled", num_samples=10**9, **options):
    return recompute(model, batches, num_samples, method, progress=False, **options)


def statistics_of(model):
    return {name: value for name, value in model.state_dict().items() if "running" in name}


def elements(x):
    return x.transpose(0, 1).flatten(1)


def parts(x, *sizes):
    return list(x.split([*sizes, len(x) - sum(sizes)]))


@pytest.fixture
def x():
    return torch.randn(20, 3, 4, 5, dtype=torch.float64) * 2 + 3


@pytest.mark.parametrize("layer", [dn.DomainBatchNorm, nn.BatchNorm2d])
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_pooled_does_not_depend_on_the_split(layer, sizes):
    x = torch.randn(20, 3, 4, 5, dtype=torch.float64) * 2 + 3
    got = statistics_of(
        quiet(layer(3).double(), [b for b in parts(x, *sizes) if layer is dn.DomainBatchNorm or len(b)])
    )
    torch.testing.assert_close(got["running_mean"], elements(x).mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["running_var"], elements(x).var(1), rtol=1e-12, atol=1e-12)


def test_mean_of_variances_is_equation_3(x):
    batches = parts(x, 5, 12)
    got = statistics_of(quiet(dn.DomainBatchNorm(3).double(), [*batches, x[:0]], "mean_of_variances"))
    mean = sum(elements(b).mean(1) for b in batches) / 3
    var = sum(elements(b).var(1) for b in batches) / 3
    torch.testing.assert_close(got["running_mean"], mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["running_var"], var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_large_means_in_float32(method):
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64) * 0.1 + 1e3
    got = statistics_of(quiet(dn.DomainBatchNorm(3), x.float().split(8), method))
    torch.testing.assert_close(got["running_mean"].double(), elements(x).mean(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(got["running_var"].double(), elements(x).var(1), rtol=2e-3, atol=0)  # Eq. 3 is no pool
    if method != "mean_of_variances":
        exact = elements(x.float().double()).var(1)
        torch.testing.assert_close(got["running_var"].double(), exact, rtol=1e-4, atol=0)


class Shared(nn.Module):
    """One layer, reached three times in a forward, with other sizes; a second after it; one never reached."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.after, self.unreached = layer(3), layer(3), layer(3)

    def forward(self, x):
        levels = [x, x[..., ::2] * 3 + 1, x[:, :, :2] * 0.5]
        return [self.after(self.layer(level)) for level in levels]


@pytest.mark.parametrize("layer", [dn.DomainBatchNorm, nn.BatchNorm2d])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_reached_several_times_and_one_never(x, layer, method):
    model = Shared(layer).double()
    before = copy.deepcopy(model.unreached.state_dict())
    quiet(model, x.split(5), method)
    levels = [
        torch.cat([elements(level) for level in (b, b[..., ::2] * 3 + 1, b[:, :, :2] * 0.5)], 1) for b in x.split(5)
    ]
    if method != "mean_of_variances":
        everything = torch.cat(levels, 1)
        torch.testing.assert_close(model.layer.running_mean, everything.mean(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model.layer.running_var, everything.var(1), rtol=1e-12, atol=1e-12)
    else:
        mean = sum(elements(v).mean(1) for b in x.split(5) for v in (b, b[..., ::2] * 3 + 1, b[:, :, :2] * 0.5)) / 12
        torch.testing.assert_close(model.layer.running_mean, mean, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(model.unreached.state_dict().values(), before.values(), strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("sgd", "population"),
    [("per_domain", "per_domain"), ("per_domain", "shared"), ("shared", "shared"), ("shared", "per_domain")],
)
def test_domains(x, method, sgd, population):
    layer = dn.DomainBatchNorm(3, num_domains=3, sgd_statistics=sgd, population_statistics=population).double()
    batches = [[b, b[..., :2] * 2 - 1, b[:0]] for b in x.split(5)]
    quiet(layer, batches, method)
    domains = [elements(x), elements(x[..., :2] * 2 - 1)]
    if population == "shared":
        expected = torch.cat(domains, 1)
        if method != "mean_of_variances":
            torch.testing.assert_close(layer.running_var, expected.var(1), rtol=1e-12, atol=1e-12)
        elif sgd == "per_domain":
            means = [elements(v).mean(1) for b in batches for v in b[:2]]
            torch.testing.assert_close(layer.running_mean, sum(means) / len(means), rtol=1e-12, atol=1e-12)
        else:
            torch.testing.assert_close(layer.running_mean, expected.mean(1), rtol=1e-12, atol=1e-12)
    else:
        for k, domain in enumerate(domains):
            torch.testing.assert_close(layer.running_mean[k], domain.mean(1), rtol=1e-12, atol=1e-12)
            if method != "mean_of_variances":
                torch.testing.assert_close(layer.running_var[k], domain.var(1), rtol=1e-12, atol=1e-12)
        assert layer.running_mean[2].tolist() == [0, 0, 0] and layer.running_var[2].tolist() == [1, 1, 1]


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32, dtype=torch.float64)
    model = torchvision.models.resnet18(num_classes=4).double()
    whole = copy.deepcopy(model).train()
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        whole(images)
    return model, images, statistics_of(whole)


@pytest.mark.parametrize("size", [2, 8, 64])
def test_exact_is_one_batch_of_all_images_on_resnet18(resnet, size):
    model, images, expected = resnet
    got = statistics_of(quiet(copy.deepcopy(model), images.split(size), "exact"))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("into", ["memory", "files"])
def test_parked_batches_change_nothing(resnet, tmp_path, into):
    model, images, expected = resnet
    options = {"live": 2, "folder": tmp_path if into == "files" else None}
    got = statistics_of(quiet(copy.deepcopy(model), images.split(8), "exact", **options))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert list(tmp_path.iterdir()) == []


class Constant(nn.Module):
    """Makes a tensor in one forward that all later ones use, and that only a closure holds."""

    def __init__(self):
        super().__init__()
        self.first, self.second = dn.DomainBatchNorm(3), dn.DomainBatchNorm(3)
        kept = {}
        self.constant = lambda n: kept[n] if n in kept else kept.setdefault(n, torch.arange(float(n)) + 1)

    def forward(self, x):
        x = self.first(x + self.constant(x.shape[-1]))
        return self.second(x * self.constant(x.shape[-1]))


@pytest.mark.parametrize("live", [1, 2, 3])
def test_parked_tensors_that_several_forwards_use(x, live):
    expected = statistics_of(quiet(Constant(), x.float().split(4), "exact"))
    got = statistics_of(quiet(Constant(), x.float().split(4), "exact", live=live))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.second = dn.DomainBatchNorm(3), dn.DomainBatchNorm(3)

    def forward(self, x):
        y = self.second(self.norm(x))
        assert x.untyped_storage().nbytes()  # its own input is there again
        return y if len(x) == 5 else 1 / 0


def test_inputs_are_parked_and_come_back_also_after_an_error(x):
    batches = [x[i : i + 5].clone() for i in (0, 5, 10, 15)]
    parked = []
    model = Fails().double()
    model.second.register_forward_pre_hook(lambda *_: parked.append([b.untyped_storage().nbytes() for b in batches]))
    quiet(model, batches, "exact", live=1)
    assert max(sum(size > 0 for size in sizes) for sizes in parked) == 1
    with pytest.raises(ZeroDivisionError):
        quiet(model, [*batches, x[:4].clone()], "exact", live=1)
    assert torch.equal(torch.cat(batches), x)


def test_exact_takes_one_pass(resnet):
    model, images, _ = resnet
    model = copy.deepcopy(model)
    calls = []
    model.conv1.register_forward_hook(lambda *_: calls.append(1))
    quiet(model, images.split(8), "exact")
    assert len(calls) == 8


# what else a model may do


class Fussy(nn.Module):
    """Raises, or goes another way, at the given call."""

    def __init__(self, at, what):
        super().__init__()
        self.first, self.second, self.third = dn.DomainBatchNorm(3), nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.at, self.what, self.number = at, what, 0

    def forward(self, x):
        self.calls += 1
        self.number += 1
        here = self.number == self.at
        x = self.first(x)
        if here and self.what == "raise":
            raise ZeroDivisionError("midway")
        return x if here and self.what == "skip" else self.third(self.second(x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", [True, False])
def test_an_error_midway_leaves_the_model_as_it_was(x, method, mode):
    model = Fussy(2, "raise").train(mode)
    model.second.eval()
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    with pytest.raises(ZeroDivisionError, match="midway"):
        quiet(model, x.float().split(5), method)
    assert flags == [m.training for m in model.modules()]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.first.batch_hook is None and not model.second._forward_pre_hooks and model.first.statistics == "auto"
    assert not [t for t in threading.enumerate() if t.name.startswith("domainnorm")]


def test_control_flow_that_differs_is_an_error_for_exact(x):
    model = Fussy(3, "skip").train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OutOfStepError, match=r"forward 0 is at second, forward 2 finished"):
        quiet(model, x.float().split(5), "exact")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    quiet(Fussy(3, "skip").train(), x.float().split(5), "pooled")


@pytest.mark.parametrize("method", METHODS)
def test_only_statistics_change_and_only_of_layers_in_training(x, method):
    model = Fussy(0, "").train()
    model.second.eval()
    model.frozen = dn.FrozenBatchNorm(3)
    before = copy.deepcopy(model.state_dict())
    pointers = [b.data_ptr() for b in model.buffers()]
    assert quiet(model, x.float().split(5), method) is model
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"first.running_mean", "first.running_var"}
    assert pointers == [b.data_ptr() for b in model.buffers()]  # in place
    assert model.training and not model.second.training

    quiet(model.eval(), x.float().split(5), method)  # nothing is in training: all of it is put there
    assert not model.training and not torch.equal(model.second.running_mean, before["second.running_mean"])


@pytest.mark.parametrize("method", METHODS)
def test_one_element_has_no_variance(method):
    layer = dn.DomainBatchNorm(3, num_domains=2, sgd_statistics="shared").double()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    quiet(layer, [[x, torch.ones(1, 3, dtype=torch.float64)]], method)
    assert layer.running_mean[1].tolist() == [1, 1, 1] and layer.running_var[1].tolist() == [1, 1, 1]


def test_hooks_of_others_are_not_lost(x):
    layer = dn.DomainBatchNorm(3).double()
    layer.batch_hook = hook = lambda *_: None
    with pytest.raises(ValueError, match="has a batch_hook already"):
        quiet(layer, x.split(5))
    assert layer.batch_hook is hook


@pytest.mark.parametrize(
    ("batch", "number"),
    [
        (torch.zeros(5, 3, 2, 2), 5),
        ([torch.zeros(3, 4, 4)] * 6, 6),
        (([torch.zeros(3, 4, 4)] * 6, [{"boxes": torch.zeros(9, 4)}] * 6), 6),
        ([torch.zeros(5, 3, 2), torch.zeros(5)], 5),
        ({"name": "a", "x": torch.zeros(7, 2)}, 7),
        ({}, 1),
        (None, 1),
    ],
)
def test_number_of_samples(batch, number):
    assert batch_size(batch) == number


def test_samples_are_counted_and_mistakes_named(x):
    seen = []
    model = dn.DomainBatchNorm(3).double()
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    quiet(model, x.split(4), num_samples=10)
    assert seen == [4, 4, 4]
    with pytest.raises(ValueError, match="method takes one of"):
        quiet(model, x.split(4), "mean")
    with pytest.raises(ValueError, match="no BatchNorm"):
        quiet(nn.Linear(2, 2), x.split(4))
    for method in METHODS:
        with pytest.raises(ValueError, match="batch"):
            quiet(model, [], method)


# ranks


def on_ranks(rank, method, sync, sizes):
    torch.manual_seed(0)
    x = torch.randn(24, 3, 4, 5, dtype=torch.float64)
    first, second = (dn.DomainBatchNorm(3, sync=sync) for _ in range(2))
    model = nn.Sequential(first, nn.ReLU(), second).double()
    own = x[sum(sizes[:rank]) : sum(sizes[: rank + 1])]
    quiet(model, own.split(4), method)
    return statistics_of(model)


@pytest.mark.parametrize(
    ("method", "sync"), [("pooled", False), ("mean_of_variances", False), ("exact", False), ("exact", True)]
)
def test_ranks_have_the_statistics_of_one_with_all_the_data(method, sync):
    expected = on_ranks(0, method, False, [24])
    for got in run_ranks(on_ranks, 3, method, sync, [4, 12, 8]):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["pooled", "mean_of_variances"])
def test_synchronized_layers_stop_with_the_first_rank_that_has_no_more(method):
    torch.manual_seed(0)
    x = torch.randn(24, 3, 4, 5, dtype=torch.float64)
    ranks = run_ranks(on_ranks, 2, method, True, [8, 16])
    batches = [torch.cat([x[i : i + 4], x[8 + i : 12 + i]]) for i in (0, 4)]
    model = nn.Sequential(dn.DomainBatchNorm(3), nn.ReLU(), dn.DomainBatchNorm(3)).double()
    expected = statistics_of(quiet(model, batches, method))
    for got in ranks:
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def no_batch_here(rank):
    with pytest.raises(ValueError, match=r"there is none on \[1\]"):
        quiet(dn.DomainBatchNorm(3), [torch.randn(4, 3, 2, 2)] if rank == 0 else [], "exact")


def test_exact_needs_a_batch_on_every_rank():
    run_ranks(no_batch_here, 2)


class Turned(nn.Module):
    def __init__(self, turned):
        super().__init__()
        self.a, self.b, self.turned = dn.DomainBatchNorm(3), dn.DomainBatchNorm(3), turned

    def forward(self, x):
        return self.a(self.b(x)) if self.turned else self.b(self.a(x))


def out_of_step(rank):
    model = Turned(turned=rank == 1)
    with pytest.raises(OutOfStepError, match=r"the ranks are \['at a', 'at b'\]"):
        quiet(model, [torch.randn(4, 3, 2, 2)], "exact")
    assert model.a.running_mean.tolist() == [0, 0, 0]


def test_ranks_that_run_their_layers_in_another_order_are_an_error():
    run_ranks(out_of_step, 2)


# ---- nothing depends on the old statistics, and B is chosen apart from training -------------------------------------


class Stack(nn.Module):
    """conv, norm, ReLU, conv, norm: what the second norm sees depends on how the first one normalizes."""

    def __init__(self, make):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), make()
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, bias=False), make()

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))


def images(number, seed=0, size=7):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(make):
    torch.manual_seed(0)
    model = Stack(make).double()
    for step in range(30):
        model(images(16, step) * 2 + 1)
    return model


def as_batch_norm(model):
    """The same weights with BatchNorms of torch, whose recomputed statistics are beyond doubt."""
    twin = Stack(lambda: nn.BatchNorm2d(8)).double()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("samples_per_group", [None, 4])
@pytest.mark.parametrize("method", ["pooled", "mean_of_variances"])
def test_batch_renorm_is_not_pulled_towards_the_old_statistics(method, samples_per_group):
    model = trained(lambda: dn.BatchRenorm(8, momentum=0.1, samples_per_group=samples_per_group))
    shifted = [images(20, 100 + k) * 6 - 9 for k in range(8)]
    twin = quiet(as_batch_norm(model), shifted, method)
    quiet(model, shifted, method)
    for key, value in statistics_of(twin).items():
        torch.testing.assert_close(statistics_of(model)[key], value, rtol=1e-9, atol=1e-9)
    y = model.eval()(torch.cat(shifted))
    if method == "pooled":
        assert y.mean((0, 2, 3)).abs().max() < 0.05 and (y.var((0, 2, 3)) - 1).abs().max() < 0.1
    assert all(layer.is_corrected for layer in (model.norm1, model.norm2))


GROUPED = {
    "ghost": lambda: dn.GhostBatchNorm(8, samples_per_group=4),
    "ghost, number": lambda: dn.GhostBatchNorm(8, num_sample_groups=4),
    "renorm": lambda: dn.BatchRenorm(8, samples_per_group=4),
}


@pytest.mark.parametrize("kind", GROUPED)
def test_layers_that_split_the_batch_normalize_all_of_it_unless_told_otherwise(kind):
    model = trained(GROUPED[kind])
    for size in (2, 8, 20, 40):
        batches = list(images(80, 7).split(size))
        twin = quiet(as_batch_norm(model), batches)
        own = quiet(copy.deepcopy(model), batches)
        for key, value in statistics_of(twin).items():
            torch.testing.assert_close(statistics_of(own)[key], value, rtol=1e-9, atol=1e-9)
    grouped = quiet(copy.deepcopy(model), batches, keep_groups=True)
    of_groups = quiet(as_batch_norm(model), images(80, 7).split(10 if kind == "ghost, number" else 4))
    for key, value in statistics_of(of_groups).items():
        torch.testing.assert_close(statistics_of(grouped)[key], value, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(grouped.norm2.running_var, own.norm2.running_var, rtol=1e-3)
    assert model.norm1.sample_groups.allow_smaller_batch is False


@pytest.mark.parametrize("make", [GROUPED["ghost"], lambda: dn.SeqNorm(8, num_channel_groups=2, num_sample_groups=4)])
def test_seq_norm_and_others_are_put_back_when_the_model_raises(make):
    model = trained(make)
    groups = model.norm1.sample_groups
    with pytest.raises(RuntimeError):
        quiet(model, [images(8), torch.zeros(2, 5, 7, 7, dtype=torch.float64)])
    assert model.norm1.sample_groups is groups and model.norm1.is_corrected


def test_a_group_norm_stays_one():
    """It is no split of the batch, and later layers are measured on what it makes."""
    model = Stack(lambda: nn.GroupNorm(4, 8)).double()
    x = images(40) * 3 + 1
    seen = []
    handle = model.norm2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    handle.remove()
    quiet(dn.convert_groupnorm(model), [x])
    torch.testing.assert_close(model.norm2.running_var, elements(seen[0]).var(1))


def test_seq_norm_of_a_whole_batch():
    """Each channel of the group-normalized features over all samples, whatever the groups of training."""
    layer = dn.SeqNorm(8, num_channel_groups=2, num_sample_groups=4).double()
    x = torch.randn(12, 8, 5, 5, dtype=torch.float64) * 3 + 1
    quiet(layer, [x])
    z = nn.functional.group_norm(x, 2)
    torch.testing.assert_close(layer.running_var, elements(z).var(1))
    model = nn.Sequential(layer, nn.Flatten(2), nn.BatchNorm1d(8).double())
    quiet(model, [x])
    torch.testing.assert_close(model[2].running_var, torch.ones(8).double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_batches_of_another_size(size):
    model = trained(lambda: dn.DomainBatchNorm(8))
    x = images(37)
    a, b = (
        statistics_of(quiet(copy.deepcopy(model), batches, **options))
        for batches, options in ((x.split(5), {"samples_per_batch": size}), (x.split(size), {}))
    )
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=1e-12, atol=1e-12)


def test_samples_of_any_form_in_other_batches():
    x, labels = torch.arange(7.0)[:, None], list("abcdefg")
    pictures = [torch.full((3, 4, 4 + k), float(k)) for k in range(7)]
    targets = [{"boxes": torch.full((k, 4), float(k))} for k in range(7)]
    for cut, whole in (
        (lambda a, b: x[a:b], x),
        (lambda a, b: (x[a:b], labels[a:b]), (x, labels)),
        (lambda a, b: [x[a:b], x[a:b] + 1], [x, x + 1]),
        (lambda a, b: [pictures[a:b], targets[a:b]], [pictures, targets]),
        (lambda a, b: Pair(x[a:b], targets[a:b]), Pair(x, targets)),
        (lambda a, b: {"x": x[a:b], "y": pictures[a:b]}, {"x": x, "y": pictures}),
        (lambda a, b: (pictures[a:b], targets[a:b]), (pictures, targets)),
        (lambda a, b: pictures[a:b], pictures),
    ):
        given = [cut(0, 3), cut(3, 4), cut(4, 7)]
        found = list(regrouped(given, 2))
        assert [batch_size(batch) for batch in found] == [2, 2, 2, 1]
        assert same(found, [cut(0, 2), cut(2, 4), cut(4, 6), cut(6, 7)])
        assert same(list(regrouped(given, 9)), [whole])
    pairs = [[pictures[a : a + 2], targets[a : a + 2]] for a in (0, 2, 4)]  # as many of a batch as there are parts
    assert same(list(regrouped(pairs, 3)), [[pictures[:3], targets[:3]], [pictures[3:6], targets[3:6]]])
    with pytest.raises(ValueError, match="a list of 2 tensors with 2 rows each may be as many samples, or inputs and"):
        list(regrouped([[x[:2], x[:2]]], 1))
    with pytest.raises(ValueError, match=r"samples of different sizes, \[\(1,\), \(2,\)\]"):
        list(regrouped([x[:2], x[:2].repeat(1, 2)], 3))
    with pytest.raises(ValueError, match=r"samples_per_batch: expected tensors and lists of 3 samples, got str"):
        list(regrouped([(x[:3], "abc")], 2))
    with pytest.raises(ValueError, match="samples_per_batch takes a positive number, got 0"):
        quiet(nn.BatchNorm1d(1), [x], samples_per_batch=0)


class Pair(NamedTuple):
    x: torch.Tensor
    y: list


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b
