"""Every layer keeps the contract of torch's BatchNorm: constructor, methods, state dicts, helpers that look for it."""

import copy
import pickle

import pytest
import torch
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, freeze_batch_norm_2d
from torch import nn
from torch.distributed.fsdp import MixedPrecision
from torch.nn.utils import parametrize, prune, skip_init
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops._utils import split_normalization_params

import domainnorm as dn

C = 8
OPTIONS = {
    "DomainBatchNorm": {},
    "GhostBatchNorm": {"samples_per_group": 2},
    "SeqNorm": {"num_channel_groups": 2, "num_sample_groups": 2},
    "BatchGroupNorm": {"num_groups": 2},
    "GroupedBatchNorm": {"num_channel_groups": 2, "samples_per_group": 2},
    "BatchRenorm": {},
    "FrozenBatchNorm": {},
}
TRAINING = [name for name in OPTIONS if name != "FrozenBatchNorm"]
VARIANTS = {
    "default": {},
    "eps, momentum": {"eps": 1e-3, "momentum": 0.3},
    "cumulative": {"momentum": None},
    "affine=True": {"affine": True},
    "affine=False": {"affine": False},
    "no bias": {"bias": False},
    "no running statistics": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
    "float64": {"dtype": torch.float64, "device": "cpu"},
}
each_layer = pytest.mark.parametrize("name", OPTIONS)
each_training_layer = pytest.mark.parametrize("name", TRAINING)


def build(name, **options):
    return getattr(dn, name)(C, **OPTIONS[name], **options)


def moved(layer):
    """The layer with an affine and population statistics unlike those at construction."""
    with torch.no_grad():
        for value in (*layer.parameters(), layer.running_mean, layer.running_var):
            if value is not None:
                value.uniform_(0.5, 2)
    return layer


def images(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 + 1


def as_torch(variant):
    """The variant as an nn.BatchNorm2d; `bias=` is new in torch 2.15."""
    layer = nn.BatchNorm2d(C, **{key: value for key, value in variant.items() if key != "bias"})
    if not variant.get("bias", True):
        layer.bias = None
    return layer


@pytest.mark.parametrize("variant", VARIANTS)
@each_layer
def test_every_variant_of_the_constructor_trains_and_infers(name, variant):
    options = VARIANTS[variant]
    if name == "FrozenBatchNorm" and not options.get("track_running_stats", True):
        with pytest.raises(ValueError, match="keeps no running statistics that could be frozen"):
            build(name, **options)
        return
    layer, twin = build(name, **options), as_torch(options)
    assert list(layer.state_dict()) == list(twin.state_dict())
    assert layer.affine == ("shared" if twin.affine else None)
    assert (layer.bias is None) == (twin.bias is None)
    assert layer.track_running_stats == twin.track_running_stats
    assert (layer.num_features, layer.eps) == (twin.num_features, twin.eps)
    dtype = options.get("dtype", torch.float32)
    for seed in range(2):
        x = images(4, C, 5, 5, seed=seed, dtype=dtype).requires_grad_()
        layer(x).sum().backward()
        if name == "DomainBatchNorm":
            torch.testing.assert_close(layer(x), twin(x))
            twin(x)
    if name == "DomainBatchNorm":
        twin.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer.eval()(x), twin.eval()(x))
    again = build(name, **options)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("channels_last", [False, True])
@each_layer
def test_gamma_without_beta(name, channels_last):
    with_bias, without = moved(build(name)), build(name, bias=False)
    with_bias.bias.data.zero_()
    without.load_state_dict({key: value for key, value in with_bias.state_dict().items() if key != "bias"})
    grads = []
    for layer in (with_bias, without):
        x = images(6, C, 60, 60).requires_grad_()
        y = layer(x.to(memory_format=torch.channels_last) if channels_last else x)
        y.square().mean().backward()
        grads.append((y, x.grad, layer.weight.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other) if one is not None else None


@pytest.mark.slow
def test_gamma_without_beta_compiled():
    layer = moved(dn.DomainBatchNorm(C, bias=False))
    compiled = torch.compile(layer, fullgraph=True)
    for size in (8, 200):  # the compiler's own kernel, and the operator
        x = images(6, C, size, size)
        torch.testing.assert_close(compiled(x), layer(x))


@each_training_layer
def test_without_running_statistics_those_of_the_minibatch_normalize_always(name):
    layer, x = build(name, track_running_stats=False), images(4, C, 5, 5)
    torch.testing.assert_close(layer.eval()(x), dn.set_statistics(build(name), "minibatch").eval()(x))
    layer.statistics = "population"
    with pytest.raises(RuntimeError, match=r"keeps none .*dn.set_statistics"):
        layer(x)


@each_layer
def test_reset(name):
    layer, fresh = moved(build(name)), build(name)
    frozen = name == "FrozenBatchNorm"
    weight, mean = layer.weight.detach().clone(), layer.running_mean.clone()
    layer.num_batches_tracked += 3
    layer.reset_running_stats()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.running_mean, mean if frozen else fresh.running_mean)
    layer.reset_parameters()
    for key, value in fresh.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value), key


def test_reset_forgets_the_size_of_features():
    layer = dn.BatchGroupNorm(C, num_groups=16)
    layer(images(4, C, 4, 4))
    layer.reset_parameters()
    layer(images(4, C, 6, 6))


@each_layer
def test_built_on_no_device_and_initialized_later(name):
    """As torch.nn.utils.skip_init and FSDP do."""
    layer = build(name, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    x = images(4, C, 5, 5)
    torch.testing.assert_close(layer(x), build(name)(x))
    assert skip_init(getattr(dn, name), C, **OPTIONS[name]).weight.device.type == "cpu"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dn.DomainBatchNorm(C, 1e-3), r"DomainBatchNorm\(8, eps=0.001\)"),
        (lambda: dn.DomainBatchNorm(C, 1e-3, 0.01), r"eps=0.001, momentum=0.01"),
        (lambda: dn.DomainBatchNorm(C, 5), r"DomainBatchNorm\(8, num_domains=5\)"),
        (lambda: dn.GhostBatchNorm(C, 16), r"GhostBatchNorm\(8, samples_per_group=16\)"),
        (lambda: dn.SeqNorm(C, 4, 8), r"SeqNorm\(8, num_channel_groups=4, num_sample_groups=8\)"),
        (lambda: dn.GroupedBatchNorm(C, 4, 2), r"num_channel_groups=4, samples_per_group=2"),
        (lambda: dn.BatchGroupNorm(C, 4), r"num_groups=4"),
        (lambda: dn.BatchRenorm(C, 1e-3), r"eps=0.001"),
        (lambda: dn.FrozenBatchNorm(C, True), r"train_affine=True"),
        (lambda: dn.FrozenBatchNorm(C, 1e-3), r"eps=0.001"),
    ],
)
def test_arguments_after_the_first_are_keywords(make, message):
    with pytest.raises(TypeError, match=message):
        make()


INPUTS = {
    **{str(d): images(4, C, 3, 3).to(d) for d in (torch.int64, torch.uint8, torch.bool, torch.complex64)},
    "float8": images(4, C, 3, 3).to(torch.float8_e4m3fn),
    "sparse": images(4, C, 3, 3).to_sparse(),
    "array": images(4, C, 3, 3).numpy(),
    "list of arrays": [images(4, C, 3, 3).numpy()],
    "nothing": None,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", INPUTS)
@each_layer
def test_inputs_that_torch_refuses_are_refused(name, kind, training):
    with pytest.raises((TypeError, NotImplementedError, RuntimeError, AttributeError)):
        nn.BatchNorm2d(C).train(training)(INPUTS[kind])
    layer = build(name).train(training)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(TypeError, match="expected"):
        layer(INPUTS[kind])
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


# Helpers of torch and others that look for BatchNorms in a model.


class Net(nn.Module):
    def __init__(self, norm, last=None):
        super().__init__()
        self.conv1, self.norm1, self.relu = nn.Conv2d(3, C, 3, bias=False), norm, nn.ReLU()
        self.conv2, self.norm2 = nn.Conv2d(C, C, 3, bias=False), last or copy.deepcopy(norm)

    def forward(self, x):
        return self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))


def loader(number=6):
    return [images(8, 3, 9, 9, seed=seed) for seed in range(number)]


@each_training_layer
def test_update_bn(name):
    """torch.optim.swa_utils: the cumulative average over the batches, whatever the statistics were before."""
    torch.manual_seed(0)
    model = Net(moved(build(name)))
    other = copy.deepcopy(model)
    moved(other.norm1), moved(other.norm2)
    other.norm1.load_state_dict(model.norm1.state_dict() | {"running_mean": other.norm1.running_mean})
    for norm in (other.norm1, other.norm2):
        for key in ("weight", "bias"):
            getattr(norm, key).data.copy_(getattr(model.norm1, key))
    twin = Net(nn.BatchNorm2d(C))
    twin.load_state_dict({**model.state_dict()}) if name == "DomainBatchNorm" else None
    momentum = model.norm1.momentum
    for one in (model, other, twin):
        update_bn(loader(), one)
    assert model.norm1.momentum == momentum
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key], msg=key)
    assert model.norm2.num_batches_tracked == 6
    if name == "DomainBatchNorm":
        for key, value in twin.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], value)


def test_update_bn_of_batch_renorm_measures_what_inference_meets():
    """Renorm pulls towards the old statistics, of which there are none at first."""
    torch.manual_seed(0)
    model = Net(dn.BatchRenorm(C))
    with torch.no_grad():
        model.conv1.weight *= 30
    update_bn(loader(20), model)
    y = model.eval()(torch.cat(loader(20)))
    assert y.mean((0, 2, 3)).abs().max() < 0.05
    assert (y.var((0, 2, 3)) - 1).abs().max() < 0.1


def test_update_bn_leaves_frozen_statistics():
    model = Net(moved(dn.FrozenBatchNorm(C)), dn.DomainBatchNorm(C))
    before = copy.deepcopy(model.norm1.state_dict())
    update_bn(loader(), model)
    assert all(torch.equal(before[key], value) for key, value in model.norm1.state_dict().items())
    assert model.norm2.num_batches_tracked == 6


def test_an_average_of_models_with_its_buffers():
    model = Net(dn.BatchGroupNorm(C, num_groups=4), dn.DomainBatchNorm(C))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for x in loader(3):
        model(x)
        average.update_parameters(model)
    assert not torch.equal(average.module.norm1.running_mean, torch.zeros(4))
    update_bn(loader(), average)


@each_training_layer
def test_fvcores_precise_bn(name):
    torch.manual_seed(0)
    model, twin = Net(build(name)), Net(nn.BatchNorm2d(C))
    assert get_bn_modules(model) == [model.norm1, model.norm2]
    update_bn_stats(model, loader(), 6)
    if name == "DomainBatchNorm":
        twin.load_state_dict(model.state_dict())
        twin.norm1.reset_running_stats(), twin.norm2.reset_running_stats()
        update_bn_stats(twin, loader(), 6)
        torch.testing.assert_close(model.norm2.running_var, twin.norm2.running_var)
    assert model.norm2.running_mean.abs().max() > 0


def test_fvcores_precise_bn_does_not_scale_frozen_variances():
    model = Net(moved(dn.FrozenBatchNorm(C)), moved(build("SeqNorm")))
    model.norm2.frozen = True
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"is frozen.*eval mode.*dn.recompute_population_statistics"):
        update_bn_stats(model, loader(), 6)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.norm1.eval(), model.norm2.eval()
    update_bn_stats(model, loader(), 6)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


REPLACING = {
    "torch": lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(model),
    "timm sync": convert_sync_batchnorm,
    "timm split": lambda model: convert_splitbn_model(model, 2),
    "timm freeze": freeze_batch_norm_2d,
}


@pytest.mark.parametrize("helper", REPLACING)
def test_helpers_replace_what_is_torchs_batch_norm(helper):
    model, x = Net(moved(dn.DomainBatchNorm(C))).eval(), loader(1)[0]
    expected = model(x)
    model = REPLACING[helper](model).eval()
    assert not isinstance(model.norm1, dn.DomainBatchNorm)
    if "sync" not in helper and helper != "torch":  # nn.SyncBatchNorm infers on a GPU only in older torch
        torch.testing.assert_close(model(x), expected)


NOT_TORCHS = {
    **{name: lambda name=name: build(name) for name in OPTIONS if name != "DomainBatchNorm"},
    "several domains": lambda: dn.DomainBatchNorm(C, num_domains=2),
    "under minibatch statistics": lambda: dn.set_statistics(dn.DomainBatchNorm(C), "minibatch"),
    "with an example weight": lambda: dn.set_example_weight(dn.DomainBatchNorm(C), 0.1),
}


@pytest.mark.parametrize("helper", REPLACING)
@pytest.mark.parametrize("kind", NOT_TORCHS)
def test_helpers_that_would_replace_anything_else_are_refused(kind, helper):
    model = Net(NOT_TORCHS[kind]())
    with pytest.raises(TypeError, match=r"dn.convert_batchnorm\(model, 'SyncBN'\).*dn.freeze_batchnorm\(model\)"):
        REPLACING[helper](model)
    assert type(model.norm1) is type(NOT_TORCHS[kind]())


@each_layer
def test_groups_of_parameters_and_idioms(name):
    model = Net(build(name)).train()
    norms, others = split_normalization_params(model)
    expected = [] if name == "FrozenBatchNorm" else [*model.norm1.parameters(), *model.norm2.parameters()]
    assert {id(p) for p in norms} == {id(p) for p in expected}
    assert len(others) == 2
    for module in model.modules():  # mmdetection's norm_eval
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    assert not model.norm1.training and not model.norm1.uses_minibatch
    assert isinstance(model.norm1, MixedPrecision()._module_classes_to_ignore)


@each_training_layer
def test_running_statistics_taken_away_for_torch_func(name):
    model, x = Net(build(name)), loader(1)[0]
    expected = copy.deepcopy(model)(x)
    torch.func.replace_all_batch_norm_modules_(model)
    assert not any(model.buffers())
    torch.testing.assert_close(model(x), expected if name != "BatchRenorm" else without_correction(model, x))
    torch.testing.assert_close(model.eval()(x), model.train()(x))


def without_correction(model, x):
    """Batch Renorm without running statistics has nothing to correct towards: it is BatchNorm."""
    plain = Net(dn.DomainBatchNorm(C))
    plain.load_state_dict({**plain.state_dict(), **model.state_dict()})
    return plain(x)


@each_layer
def test_pruned_and_parametrized_gamma(name):
    x = images(4, C, 5, 5)
    for change in (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Softplus()),
    ):
        model = nn.Sequential(moved(build(name)))
        change(model[0])
        plain = build(name)
        plain.load_state_dict({**model[0].state_dict(), "weight": model[0].weight.detach()}, strict=False)
        torch.testing.assert_close(model(x), plain(x))
        for convert in (lambda m: dn.convert_batchnorm(m, "GhostBN", samples_per_group=2), dn.freeze_batchnorm):
            if name == "FrozenBatchNorm":  # stays
                assert convert(model) is model
                continue
            with pytest.raises(ValueError, match=r"^0: its weight is pruned or parametrized.*prune.remove"):
                convert(model)
            assert model[0].weight is not None


@each_layer
def test_torchvisions_feature_extractor(name):
    model = Net(build(name))
    extractor = create_feature_extractor(model, {"norm1": "a", "norm2": "b"})
    x = loader(1)[0]
    assert torch.equal(extractor.eval()(x)["b"], model.eval()(x))


@each_layer
def test_copies(name):
    layer, x = moved(build(name)), images(4, C, 5, 5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)
        assert torch.equal(other(x), copy.deepcopy(layer)(x))


def named():
    names = ["lisc.v1", "pbc", "shapes of things"]
    model = nn.Sequential(dn.DomainBatchNorm(C, num_domains=3), dn.BatchGroupNorm(C, num_groups=16, num_domains=3))
    dn.name_domains(model, names)
    model[1](images(4, C, 4, 4), domain=1)
    return model, names


@pytest.mark.parametrize("arithmetic", ["mean", "half", "stack"])
def test_state_dicts_are_averaged_and_cast(arithmetic):
    (one, names), (other, _) = named(), named()
    states = one.state_dict(), other.state_dict()
    if arithmetic == "mean":
        state = {key: (states[0][key] + states[1][key]) / 2 for key in states[0]}
    elif arithmetic == "stack":
        state = {key: torch.stack([own[key].double() for own in states]).mean(0) for key in states[0]}
    else:
        state = {key: value.half() for key, value in states[0].items()}
    model, _ = named()
    for layer in model:
        layer.domain_names = None
    model[1].feature_size = None
    assert model.load_state_dict(state).missing_keys == []
    assert all(layer.domain_names == tuple(names) for layer in model)
    assert model[1].feature_size == (4, 4)


def test_checkpoints_with_names_as_numbers_are_read():
    model, names = named()
    state = {key: value for key, value in model.state_dict().items() if "domain_names" not in key}
    for k in range(2):
        state[f"{k}.domain_names"] = torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8)
    for layer in model:
        layer.domain_names = None
    model.load_state_dict(state)
    assert all(layer.domain_names == tuple(names) for layer in model)


@pytest.mark.parametrize("affine", [True, 1, "shared"])
def test_words_and_truths_of_an_affine(affine):
    layer = dn.DomainBatchNorm(C, affine=affine)
    assert layer.affine == "shared"
    assert dn.FrozenBatchNorm.from_batch_norm(layer).affine == "shared"


def test_layers_without_beta_are_frozen_and_thawed():
    layer = moved(dn.DomainBatchNorm(C, bias=False))
    x = images(4, C, 5, 5)
    frozen = dn.freeze_batchnorm(nn.Sequential(copy.deepcopy(layer)))
    assert frozen[0].bias is None
    torch.testing.assert_close(frozen(x), layer.eval()(x))
    assert frozen[0].to_batch_norm().bias is None


def test_checkpoints_that_are_assigned_share_no_memory():
    layer = dn.DomainBatchNorm(C, track_total_var=True)
    layer.load_state_dict(nn.BatchNorm2d(C).state_dict(), assign=True)
    assert layer.running_total_var.data_ptr() != layer.running_var.data_ptr()


def test_statistics_that_are_not_tracked_any_more_stay_so():
    layer = nn.BatchNorm2d(C)
    layer.track_running_stats = False
    ours = dn.convert_batchnorm(nn.Sequential(layer), "BN")
    ours(images(4, C, 5, 5))
    assert torch.equal(ours[0].running_mean, torch.zeros(C))
    assert dn.convert_batchnorm(ours, "BatchNorm2d")[0].track_running_stats is False


def test_update_bn_puts_back_the_momentum_of_a_frozen_layer():
    model = nn.Sequential(dn.FrozenBatchNorm(C, momentum=1.0), nn.BatchNorm2d(C))
    update_bn([images(4, C, 5, 5)], model)
    assert model[0].momentum == 1.0


def test_a_subclass_may_take_more_by_position():
    class Mine(dn.DomainBatchNorm):
        def __init__(self, channels, number):
            super().__init__(channels, num_domains=number)

    assert Mine(C, 3).num_domains == 3
