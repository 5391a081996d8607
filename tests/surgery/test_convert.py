"""Norm layers of torch models exchanged for others: what is kept, and what is refused."""

import copy
import math

import pytest
import torch
from norm_cases import close
from torch import nn

import domainnorm as dn
from domainnorm.surgery.freeze import freeze_batchnorm

_BatchNorm = nn.modules.batchnorm._BatchNorm
# Each norm by its name in a config and by its class, with options for a few samples.
NAMES = {
    "BN": ("DomainBatchNorm", {}),
    "GN": ("GroupNorm", {"num_groups": 2}),
    "FrozenBN": ("FrozenBatchNorm", {}),
    "GhostBN": ("GhostBatchNorm", {"samples_per_group": 2}),
    "SeqNorm": ("SeqNorm", {"num_channel_groups": 2, "num_sample_groups": 2}),
    "BGN": ("BatchGroupNorm", {"num_groups": 2}),
    "GBGN": ("GroupedBatchNorm", {"num_channel_groups": 2, "samples_per_group": 2}),
    "BRN": ("BatchRenorm", {}),
}
SPELLINGS = [(name, options) for short, (long, options) in NAMES.items() for name in (short, long)]
every_name = pytest.mark.parametrize(("name", "options"), SPELLINGS, ids=[name for name, _ in SPELLINGS])
each_norm = pytest.mark.parametrize("name", NAMES)


def small(**options):
    """Norms of three kinds, at the root and below lists and dicts."""
    torch.manual_seed(1)
    body = {
        "list": nn.ModuleList([nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, **options)]),
        "dict": nn.ModuleDict({"a": nn.ModuleDict({"b": nn.BatchNorm1d(8, **options)})}),
    }
    return Small(body, nn.BatchNorm2d(3, **options))


class Small(nn.Module):
    def __init__(self, body, first):
        super().__init__()
        self.first = first
        self.body = nn.ModuleDict(body)
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x)
        for layer in self.body["list"]:
            x = layer(x)
        return self.last(self.body["dict"]["a"]["b"](x.relu().flatten(2)).mean(2))


def images(n=4, size=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64).to(dtype) * 2 + 1


def trained(model, x, steps=3, rate=0.02):
    """After SGD steps on a loss of all outputs; returns the outputs of each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    outputs = []
    for step in range(steps):
        torch.manual_seed(step)  # of dropout
        y = model(x)
        y = y["out"] if isinstance(y, dict) else y
        optimizer.zero_grad()
        (y.double().square().mean() + y.double().sin().mean()).backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


def norms(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (_BatchNorm, dn.DomainBatchNorm, nn.GroupNorm))}


def step_of(model, x):
    """Output and gradients of one training forward."""
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---- to every norm -------------------------------------------------------------------------------------------------


@every_name
def test_what_every_conversion_keeps(name, options):
    """Parameters, so that an optimizer goes on, eps, mode and what is frozen; the model trains and infers."""
    model = small(eps=0.03, momentum=0.4).double()
    trained(model, images())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.body["list"].eval()
    model.first.bias.requires_grad_(False)
    before, modes = dict(model.named_parameters()), {n: m.training for n, m in model.named_modules()}
    asked = {n: p.requires_grad for n, p in before.items()}

    assert dn.convert_batchnorm(model, name, **options) is model
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[n] is p for n, p in before.items())
    assert modes == {n: m.training for n, m in model.named_modules()}
    if not name.startswith("Frozen"):
        assert asked == {n: p.requires_grad for n, p in after.items()}
    layers = norms(model)
    assert list(layers) == ["first", "body.list.1", "body.dict.a.b"]
    for layer in layers.values():
        assert type(layer).__name__ == NAMES.get(name, (name,))[0] and layer.eps == 0.03
        assert isinstance(layer, (nn.GroupNorm, dn.BatchRenorm)) or layer.momentum == 0.4
    model.train()
    y, grads = step_of(model, images())
    assert y.dtype == torch.float64 and all(grad.isfinite().all() for grad in grads.values())
    value = model.last.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(value, model.last.weight)
    assert model.eval()(images()).isfinite().all()


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(8, momentum=0.3), nn.SyncBatchNorm(8), dn.DomainBatchNorm(8, num_domains=3)]
)
@each_norm
def test_a_class_and_its_name_in_a_config_make_the_same_layer(name, layer):
    long, options = NAMES[name]
    one, other = (dn.convert_batchnorm(nn.Sequential(layer), n, **options)[0] for n in (name, long))
    assert type(one).__name__ == long and repr(one) == repr(other)


@each_norm
def test_buffers(name):
    """Statistics are those of before; of a BGN's pieces the merged ones; of SeqNorm and GroupNorm new or none."""
    long, options = NAMES[name]
    layer = nn.BatchNorm2d(4).double()
    layer(images(n=3).repeat(1, 2, 1, 1)[:, :4])
    new = dn.convert_batchnorm(nn.Sequential(layer), name, **options)[0]
    assert type(new).__name__ == long
    mean, var = layer.running_mean, layer.running_var
    if name == "GN":
        assert not list(new.buffers())
        return
    if name == "BGN":
        pairs = mean.view(2, 2)
        mean, var = pairs.mean(1), var.view(2, 2).mean(1) + pairs.var(1, correction=0)
    if name == "SeqNorm":
        mean, var = torch.zeros_like(mean), torch.ones_like(var)
    close(new.running_mean, mean)
    close(new.running_var, var)
    assert new.num_batches_tracked == (name != "SeqNorm")
    assert new.running_mean.data_ptr() != layer.running_mean.data_ptr()


@pytest.mark.parametrize("name", ["FrozenBN", "GhostBN", "BRN"])
def test_inference_is_that_of_before(name):
    model = small().double()
    trained(model, images())
    expected = model.eval()(images(seed=1))
    close(dn.convert_batchnorm(model, name)(images(seed=1)), expected)


@pytest.mark.parametrize("name", ["BN", "GhostBN", "GBGN", "BRN"])
def test_there_and_back_again(name):
    """Where the statistics survive, the original infers and trains again."""
    model = small().double()
    trained(model, images())
    twin = dn.convert_batchnorm(copy.deepcopy(model), name, **NAMES[name][1])
    dn.convert_batchnorm(twin, "BN", momentum=0.1)
    for key, value in model.state_dict().items():
        close(twin.state_dict()[key], value)
    close(trained(twin, images(), 2)[1], trained(model, images(), 2)[1])


def test_seq_norm_keeps_the_statistics_of_a_seq_norm_only():
    layer = dn.SeqNorm(4, num_channel_groups=2, num_sample_groups=2)
    layer(images(dtype=torch.float32).repeat(1, 2, 1, 1)[:, :4])
    again = dn.convert_batchnorm(nn.Sequential(layer), "SeqNorm", num_channel_groups=2, num_sample_groups=1)[0]
    assert torch.equal(again.running_mean, layer.running_mean) and again.num_batches_tracked == 1
    plain = dn.convert_batchnorm(nn.Sequential(layer), "BN")[0]
    assert torch.equal(plain.running_mean, torch.zeros(4)) and plain.num_batches_tracked == 0


def test_pieces_of_channels_repeat_their_statistics():
    layer = nn.BatchNorm2d(2).double()
    layer(images()[:, :2])
    model = dn.convert_batchnorm(nn.Sequential(layer), "BGN", num_groups=8, split_space=True).eval()
    close(model[0].running_mean, layer.running_mean.repeat_interleave(4))
    close(model(images()[:, :2]), layer.eval()(images()[:, :2]))


def test_pieces_across_channels_merge_their_statistics():
    """Two pieces of three channels: each is a channel and half of the middle one."""
    layer = nn.BatchNorm2d(3).double()
    layer(images()[:, :3])
    new = dn.convert_batchnorm(nn.Sequential(layer), "BGN", num_groups=2)[0]
    parts = layer.running_mean.repeat_interleave(2).view(2, 3)
    close(new.running_mean, parts.mean(1))
    square = (layer.running_var + layer.running_mean.square()).repeat_interleave(2).view(2, 3)
    close(new.running_var, square.mean(1) - parts.mean(1).square())


def test_the_groups_of_a_bgn_are_the_papers_unless_told_otherwise():
    new = dn.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(6)), "BGN", num_groups=4)[0]
    assert new.num_groups == 4 and new(torch.randn(4, 6, 4, 4)).shape == (4, 6, 4, 4)
    assert dn.get_norm("BGN", 64, num_groups=512).num_groups == 512  # and not BatchNorm
    assert dn.get_norm("BGN", 6, num_groups=4, split_space=False).num_groups == 2


@pytest.mark.parametrize("channels", [8, 16, 32, 48])
def test_a_group_norm_has_as_many_groups_as_divide_its_channels(channels):
    layer = dn.get_norm("GN", channels)
    assert layer.num_groups == math.gcd(32, channels)
    assert layer(torch.randn(1, channels, 1, 1)).shape == (1, channels, 1, 1)  # a level of one pixel
    x = torch.randn(2, channels, 3, 3)
    close(layer(x), nn.GroupNorm(math.gcd(32, channels), channels)(x))


def test_options_of_the_layer_are_taken():
    layer = nn.BatchNorm2d(8)
    new = dn.convert_batchnorm(nn.Sequential(layer), "BN", eps=0.5, momentum=None, num_domains=3)[0]
    assert (new.eps, new.momentum, new.num_domains) == (0.5, None, 3)
    assert new.running_mean.shape == (3, 8) and new.weight is layer.weight
    nn.init.normal_(layer.weight).requires_grad_(False)
    per_domain = dn.convert_batchnorm(nn.Sequential(layer), "BN", num_domains=3, affine="per_domain")[0]
    assert torch.equal(per_domain.weight, layer.weight.expand(3, 8)) and not per_domain.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@each_norm
def test_dtype(name, dtype):
    model = dn.convert_batchnorm(small().to(dtype), name, **NAMES[name][1])
    assert {v.dtype for v in model.state_dict().values() if v.is_floating_point()} == {dtype}
    assert model(images(dtype=dtype)).dtype == dtype


def test_on_the_meta_device():
    with torch.device("meta"):
        model = small()
    assert {v.device.type for v in dn.convert_batchnorm(model, "GhostBN").state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "groups"),
    [("GN", "num_groups"), ("SeqNorm", "num_channel_groups"), ("GBGN", "num_channel_groups")],
)
def test_channels_that_a_number_of_groups_does_not_divide(name, groups):
    """6 channels and 4 groups: 2, as `get_norm` says."""
    new = dn.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(6)), name, **NAMES[name][1] | {groups: 4})
    assert getattr(new[0], groups) == 2
    assert new(torch.randn(4, 6, 3, 3)).shape == (4, 6, 3, 3)


@each_norm
def test_without_affine(name):
    model = dn.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(4, affine=False)).double(), name, **NAMES[name][1])
    assert not list(model.parameters())
    y = model(images().repeat(1, 2, 1, 1)[:, :4])
    assert abs(y.mean()) < (1e-9 if name not in ("FrozenBN", "BRN") else 5)


@pytest.mark.parametrize("name", ["BN", "GhostBN", "BGN", "GBGN"])
def test_without_running_statistics_inference_stays_that_of_the_minibatch(name):
    model = small(track_running_stats=False).double()
    expected = model(images())
    dn.convert_batchnorm(model, name, **({"samples_per_group": 4} if name == "GhostBN" else {}))
    if name in ("BN", "GhostBN"):
        close(model(images()), expected)
    close(model.eval()(images()), model.train()(images()))


@pytest.mark.parametrize(("name", "synced"), [("BN", True), ("BRN", True), ("BGN", True), ("GhostBN", False)])
def test_a_synchronized_batch_norm_stays_synchronized_where_the_layer_can(name, synced):
    new = dn.convert_batchnorm(nn.Sequential(nn.SyncBatchNorm(8)), name, **NAMES[name][1])[0]
    assert bool(new.sync) == synced
    assert bool(dn.convert_batchnorm(nn.Sequential(new), "BN")[0].sync) == synced
    assert not dn.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(8)), name)[0].sync
    assert dn.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(8)), "SyncBN")[0].sync is True


# ---- modules with several names, frozen ones, the root -------------------------------------------------------------


def test_a_shared_layer_stays_one_and_shared_parameters_stay_shared():
    shared = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": nn.Sequential(shared, shared), "b": shared, "tied": nn.BatchNorm2d(3)})
    model["tied"].weight = shared.weight
    dn.convert_batchnorm(model, "BRN")
    assert model["a"][0] is model["a"][1] is model["b"] and isinstance(model["b"], dn.BatchRenorm)
    assert model["tied"].weight is shared.weight is model["b"].weight


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), dn.DomainBatchNorm(3), nn.SyncBatchNorm(3)])
@each_norm
def test_a_bare_layer_is_left_untouched(layer, name):
    layer = copy.deepcopy(layer)
    before = copy.deepcopy(layer.state_dict())
    new = dn.convert_batchnorm(layer.eval(), name, **({"num_groups": 1} if name in ("GN", "BGN") else {}))
    assert new is not layer and not new.training and not layer.training
    with torch.no_grad():
        for value in (*new.parameters(), *new.buffers()):
            value.add_(1)
    new.train().requires_grad_(False)
    assert not layer.training and all(p.requires_grad for p in layer.parameters())
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_frozen_layers_stay():
    frozen, other = dn.FrozenBatchNorm(4), dn.SeqNorm(4, num_channel_groups=2, num_sample_groups=2)
    other.frozen = True
    model = nn.Sequential(frozen, other, nn.BatchNorm2d(4))
    dn.convert_batchnorm(model, "GhostBN")
    assert model[0] is frozen and model[1] is other and isinstance(model[2], dn.GhostBatchNorm)


def test_models_without_norms():
    for model in (nn.Sequential(), nn.Linear(2, 2), nn.InstanceNorm2d(3)):
        assert dn.convert_batchnorm(model, "BN") is model and dn.convert_groupnorm(model) is model


def test_choices_of_our_layers_are_kept():
    layer = dn.DomainBatchNorm(
        4, num_domains=3, sgd_statistics="shared", population_statistics="shared", affine=None, sync=True
    )
    layer.statistics, layer.example_weight = "population", 0.25
    new = dn.convert_batchnorm(nn.Sequential(layer), "BRN")[0]
    for key in ("num_domains", "sgd_statistics", "population_statistics", "affine", "sync", "example_weight"):
        assert getattr(new, key) == getattr(layer, key), key
    assert new.statistics == "population"


@pytest.mark.parametrize("change", ["GhostBN", "FrozenBN", "freeze", "thaw"])
def test_domains_keep_their_names_and_the_one_in_use(change):
    """Also where a name stands for two pyramid levels."""
    model = nn.Sequential(dn.DomainBatchNorm(4, num_domains=6, affine="per_domain"))
    model[0].domains_per_name = 2
    dn.use_domain(dn.name_domains(model, ["a", "b", "c"]), "b")
    state = copy.deepcopy(model.state_dict())
    if change == "freeze":
        freeze_batchnorm(model)
    elif change == "thaw":
        model = nn.Sequential(dn.FrozenBatchNorm.from_batch_norm(model[0]).to_batch_norm())
    else:
        dn.convert_batchnorm(model, change)
    assert (model[0].domain_names, model[0].domains_per_name, model[0].current_domain) == (("a", "b", "c"), 2, 1)
    assert list(model.state_dict()) == list(state)
