"""The way back: torch's own BatchNorms in the place of this library's."""

import copy
import inspect
import pickle
import re

import pytest
import torch
from norm_cases import close
from ranks import run_ranks
from test_convert import images, small, step_of, trained
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import mobilenet_v3_small

import domainnorm as dn

TORCH = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
KINDS = {"BN": {}, "SyncBN": {}, "GhostBN": {"samples_per_group": 2}, "BRN": {}, "FrozenBN": {"train_affine": True}}


def chain(**options):
    torch.manual_seed(1)
    layers = [nn.BatchNorm2d(3, **options), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU()]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("kind", KINDS)
def test_inference_parameters_and_buffers_stay(kind):
    model = dn.convert_batchnorm(chain(eps=0.03, momentum=0.4), kind, **KINDS[kind])
    trained(model, images())
    model[0].weight.requires_grad_(False)
    model[2].train(False)
    parameters, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    asked, momentum = [p.requires_grad for p in parameters], model[0].momentum
    expected = copy.deepcopy(model).eval()(images(seed=1))

    assert dn.convert_batchnorm(model, "BatchNorm2d") is model
    assert type(model[0]) is type(model[2]) is nn.BatchNorm2d
    assert (model[0].eps, model[0].momentum) == (0.03, momentum) and model[0].training and not model[2].training
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert asked == [p.requires_grad for p in model.parameters()]
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    close(model.eval()(images(seed=1)), expected)


@pytest.mark.parametrize("name", TORCH)
def test_the_name_says_which_of_torchs(name):
    shape = (4, 3, *[5] * (int(name[-2]) if name[-1] == "d" else 2))
    original = getattr(nn, name)(3, eps=0.1, momentum=None, dtype=torch.float64)
    layer = dn.convert_batchnorm(original, "DomainBatchNorm")
    layer.sync = False
    layer(torch.randn(shape, dtype=torch.float64))
    again = dn.convert_batchnorm(layer, name)
    assert type(again) is type(original) and repr(again) == repr(original)
    assert again.weight is not layer.weight and again.running_mean.data_ptr() != layer.running_mean.data_ptr()
    x = torch.randn(shape, dtype=torch.float64)
    close(again.eval()(x), layer.eval()(x))


def test_there_and_back_trains_as_before():
    model = chain()
    twin = dn.convert_batchnorm(dn.convert_batchnorm(copy.deepcopy(model), "SyncBN"), "BatchNorm2d")
    assert repr(twin) == repr(model)
    for y, expected in zip(trained(twin, images()), trained(model, images()), strict=True):
        assert torch.equal(y, expected)


WITHOUT = [{"affine": False}, {"track_running_stats": False}]
if "bias" in inspect.signature(nn.BatchNorm2d).parameters:  # not in torch 2.11
    WITHOUT.append({"bias": False})


@pytest.mark.parametrize("options", WITHOUT)
def test_what_a_layer_is_without_it_stays_without(options):
    model = chain(**options)
    dn.convert_batchnorm(model, "BN")
    assert list(model.state_dict()) == list(chain(**options).state_dict())
    dn.convert_batchnorm(model, "BatchNorm2d")
    expected = chain(**options)
    assert list(model.state_dict()) == list(expected.state_dict())
    for mode in (True, False):
        close(model.train(mode)(images()), expected.train(mode)(images()))


def test_dtypes_of_weights_and_of_statistics_stay():
    layer = nn.BatchNorm2d(4).bfloat16()
    layer.running_mean = torch.full((4,), 1 / 3)
    again = dn.convert_batchnorm(dn.convert_batchnorm(layer, "BN"), "BatchNorm2d")
    assert again.weight.dtype == torch.bfloat16 and torch.equal(again.running_mean, layer.running_mean)


def test_torchs_layers_stay_but_synchronized_ones():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3), dn.DomainBatchNorm(3), nn.BatchNorm3d(3))
    lazy = nn.LazyBatchNorm2d()
    assert dn.convert_batchnorm(lazy, "BatchNorm2d") is lazy
    first, last = model[0], model[3]
    dn.convert_batchnorm(model, "BatchNorm2d")
    assert [type(m) for m in model] == [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm3d]
    assert model[0] is first and model[3] is last
    weight = first.weight
    dn.convert_batchnorm(model, "SyncBatchNorm")
    assert {type(m) for m in model} == {nn.SyncBatchNorm} and model[0].weight is weight


def test_a_process_group_stays():
    group = object()
    layer = dn.DomainBatchNorm(3)
    layer.sync = group
    for model in (nn.Sequential(layer), nn.Sequential(nn.SyncBatchNorm(3, process_group=group))):
        assert dn.convert_batchnorm(model, "SyncBatchNorm")[0].process_group is group


def test_one_layer_of_several_names_stays_one():
    shared = dn.DomainBatchNorm(3)
    model = dn.convert_batchnorm(nn.ModuleDict({"a": nn.Sequential(shared), "b": shared}), "BatchNorm1d")
    assert model["a"][0] is model["b"] and model["b"].weight is shared.weight


def fused():
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 8, 3), layers.BatchNormAct2d(8, act_layer=nn.SiLU)).double()


@pytest.mark.parametrize("first", ["BN", "SyncBatchNorm"])
def test_timms_fused_activation_stays_there_and_back_and_there(first):
    model = fused()
    twin = dn.convert_batchnorm(dn.convert_batchnorm(copy.deepcopy(model), first), "BatchNorm2d")
    assert type(twin[1]) is nn.BatchNorm2d and list(twin.state_dict()) == list(model.state_dict())
    for copied in (twin, copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        expected = copy.deepcopy(model)
        close(step_of(copied, images())[0], step_of(expected, images())[0])
        dn.convert_batchnorm(copied, "BN")
        for mode in (True, False):
            close(copied.train(mode)(images()), expected.train(mode)(images()))


def test_timms_fused_activation_stays_with_group_norms():
    model = dn.convert_batchnorm(fused(), "GN", num_groups=4)
    expected = nn.functional.silu(nn.functional.group_norm(model[0](images()), 4))
    close(model(images()), expected)
    close(dn.convert_groupnorm(model)(images()), expected)


def domains(**options):
    return dn.DomainBatchNorm(3, num_domains=2, **options)


def weighed():
    return dn.set_example_weight(dn.DomainBatchNorm(3), 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (domains, r"torch's layers have one domain, this one 2: dn.merge_domains\(model\)"),
        (lambda: domains(population_statistics="shared"), "one domain, this one 2"),
        (lambda: dn.SeqNorm(3, num_channel_groups=1, num_sample_groups=2), "SeqNorm is no affine of each channel"),
        (lambda: dn.BatchGroupNorm(3, num_groups=1), "BatchGroupNorm is no affine"),
        (lambda: dn.GroupedBatchNorm(3, num_channel_groups=1, samples_per_group=2), "GroupedBatchNorm is no affine"),
        (lambda: dn.set_statistics(dn.DomainBatchNorm(3), "minibatch"), "track_running_stats=False"),
        (weighed, r"no example_weight, this one 0.5: dn.set_example_weight\(model, 0\)"),
    ],
)
def test_what_torchs_layers_cannot_do_is_refused_and_nothing_changed(make, message):
    model = nn.Sequential(dn.DomainBatchNorm(3), make())
    children = list(model)
    with pytest.raises(ValueError, match="^1: .*" + message):
        dn.convert_batchnorm(model, "BatchNorm2d")
    assert all(a is b for a, b in zip(model, children, strict=True))


def test_merged_domains_go_back():
    model = dn.convert_batchnorm(chain(), "BN", num_domains=2, affine="per_domain")
    with dn.use_domain(model, 1):
        model(images())
    expected = copy.deepcopy(dn.merge_domains(model)).eval()(images())
    close(dn.convert_batchnorm(model, "BatchNorm2d").eval()(images()), expected)


def test_lazy_layers_convert_after_their_first_input():
    for lazy, ndim in ((nn.LazyBatchNorm1d, 1), (nn.LazyBatchNorm2d, 2), (nn.LazyBatchNorm3d, 3)):
        model = nn.Sequential(lazy(eps=0.1)).double()
        for name in ("DomainBatchNorm", "SyncBatchNorm"):
            with pytest.raises(ValueError, match=re.escape("0: a lazy BatchNorm does not know its channels yet")):
                dn.convert_batchnorm(model, name)
        x = torch.randn(4, 3, *[2] * ndim, dtype=torch.float64)
        model(x)
        twin = dn.convert_batchnorm(copy.deepcopy(model), "DomainBatchNorm")
        assert isinstance(twin[0], dn.DomainBatchNorm) and twin[0].num_features == 3
        for mode in (True, False):
            close(twin.train(mode)(x), model.train(mode)(x))


# ---- SyncBN over processes, and back -------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    model = mobilenet_v3_small(num_classes=4, dropout=0.0).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1  # few samples at 1 × 1: keeps rounding from growing with depth
    return model


def batch():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def steps_of(model, x, network, world=1):
    """Two SGD steps of a loss that is the mean over the joint batch of 6; the last output and gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        y = network(x)
        (y.square().sum() * (world / 24)).backward()
        optimizer.step()
    return y.detach(), [p.grad for p in model.parameters()]


def synchronized(rank):
    model = dn.convert_batchnorm(network(), "SyncBN")
    x = batch().split([4, 2])[rank]
    y, grads = steps_of(model, x, DistributedDataParallel(model), world=2)
    state = copy.deepcopy(model.state_dict())
    inferred = model.eval()(batch())
    back = [dn.convert_batchnorm(copy.deepcopy(model), name)(batch()) for name in ("BatchNorm2d", "SyncBatchNorm")]
    return y, grads, state, inferred.detach(), [b.detach() for b in back]


@pytest.mark.slow
def test_synchronized_processes_are_one_on_the_joint_batch_and_go_back():
    model = network()
    y, grads = steps_of(model, batch(), model)
    state = model.state_dict()
    ranks = run_ranks(synchronized, 2)
    close(torch.cat([rank[0] for rank in ranks]), y)
    for _, own_grads, own_state, inferred, back in ranks:
        assert list(own_state) == list(state)
        for a, b in zip(own_grads, grads, strict=True):
            close(a, b)
        for key, value in state.items():
            close(own_state[key], value)
        close(inferred, model.eval()(batch()))
        assert all(torch.equal(b, inferred) for b in back)


def test_models_of_several_kinds_go_back_part_by_part():
    model = small().double()
    trained(model, images())
    twin = dn.convert_batchnorm(copy.deepcopy(model), "BN")
    dn.convert_batchnorm(twin.body["dict"], "BatchNorm1d")
    dn.convert_batchnorm(twin, "BatchNorm2d")
    assert repr(twin) == repr(model)
    assert torch.equal(twin(images()), model(images()))
