"""What holds for every layer that groups samples or channels."""

import copy
import pickle

import pytest
import torch
from norm_cases import (
    CASES,
    KINDS,
    C,
    all_close,
    check_buffers,
    check_steps,
    clone,
    close,
    gradients,
    make,
    random_input,
    refer,
    unchanged,
)
from reference_norms import Reference
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import domainnorm as dn

K = 3
SHAPE = (5, C, 2, 4)  # two groups of two and one of one; two, four or eight pieces
every = pytest.mark.parametrize("name", CASES)
each_kind = pytest.mark.parametrize("name", KINDS)
in_both_modes = pytest.mark.parametrize("training", [True, False])


@every
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"momentum": 0.7, "eps": 0.1}], ids=["default", "cumulative", "eps"]
)
def test_steps(name, options):
    check_steps(make(name, **options), refer(name, **options), *SHAPE)


@every
def test_without_affine(name):
    layer = make(name, affine=None)
    assert layer.weight is None and layer.bias is None
    check_steps(layer, refer(name), *SHAPE)


@every
def test_state_dict_is_that_of_batch_norm(name):
    layer = make(name)
    layer(random_input(*SHAPE))
    keys = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    # pieces of channels are of one feature size, which must outlive a checkpoint
    assert list(layer.state_dict()) == keys + ["feature_size"] * (name == "bgn_pieces")
    assert layer.weight.shape == layer.bias.shape == (C,)
    buffers = CASES[name][1].get("num_groups", C) if name.startswith("bgn") else C
    assert layer.running_mean.shape == layer.running_var.shape == (buffers,)
    assert layer.num_batches_tracked.shape == () and layer.num_batches_tracked.dtype == torch.long


@every
def test_state_dict_round_trip(name):
    layer, twin = make(name), make(name)
    layer(random_input(*SHAPE))
    twin.load_state_dict(layer.state_dict())
    x = random_input(*SHAPE, seed=1)
    assert torch.equal(layer(x), twin(x)) and torch.equal(layer.eval()(x), twin.eval()(x))


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_deepcopy_and_pickle(name, copied):
    layer = make(name)
    layer(random_input(*SHAPE))
    layer.statistics, layer.example_weight = "population", 0.5
    twin = copied(layer)
    assert repr(twin) == repr(layer) and twin.statistics == "population" and twin.example_weight == 0.5
    x = random_input(*SHAPE, seed=1)
    for training in (True, False):
        assert torch.equal(layer.train(training)(x), twin.train(training)(x))
    twin.running_mean += 1
    assert not torch.equal(layer.running_mean, twin.running_mean)


@every
def test_repr_shows_the_options(name):
    layer = make(name, eps=0.25, momentum=0.125)
    layer.statistics = "population"
    text = repr(layer)
    assert text.startswith(f"{CASES[name][0]}({C}, ")
    for option, value in {**CASES[name][1], "eps": 0.25, "momentum": 0.125, "statistics": "population"}.items():
        assert f"{option}={value!r}" in text
    assert "num_domains=2" in repr(make(name, num_domains=2))


@every
def test_device_and_dtype(name):
    kind, options, _ = CASES[name]
    layer = getattr(dn, kind)(C, **options, device="meta", dtype=torch.float16)
    floating = [layer.weight, layer.bias, layer.running_mean, layer.running_var]
    assert all(v.device.type == "meta" and v.dtype == torch.float16 for v in floating)
    assert layer.num_batches_tracked.device.type == "meta"


# ---- gradients -----------------------------------------------------------------------------------------------------


def pure(layer, x):
    """The layer as a function of x, γ and β that leaves the buffers alone."""

    def function(x, weight, bias):
        buffers = {name: value.clone() for name, value in layer.named_buffers()}
        return functional_call(layer, {**buffers, "weight": weight, "bias": bias}, x)

    return function, (clone(x), clone(layer.weight), clone(layer.bias))


# In Batch Renorm r and d are constants to autograd, so a numerical derivative agrees where the limits hold them.
CHECKED = {"renorm": {"r_max": 1.0, "d_max": 0.0}, "renorm_micro": {}}


@every
@in_both_modes
def test_gradcheck(name, training):
    kind, options, _ = CASES[name]
    layer = getattr(dn, kind)(C, **{**options, **CHECKED.get(name, {})}, dtype=torch.float64)
    if name == "renorm_micro":  # far from the buffers: every r is r_max, every d is d_max
        layer.running_mean.fill_(-50)
        layer.running_var.fill_(0.01)
    layer.train(training)
    assert torch.autograd.gradcheck(*pure(layer, random_input(3, C, 1, 2)))


@pytest.mark.parametrize("name", ["ghost", "gbgn"])
def test_gradgradcheck(name):
    assert torch.autograd.gradgradcheck(*pure(make(name), random_input(3, C, 2)))


@each_kind
def test_gradients_only_where_they_are_asked_for(name):
    layer, x = make(name), random_input(*SHAPE)
    expected = gradients(layer(x), [x, *layer.parameters()])
    again = make(name)
    again.load_state_dict({**again.state_dict(), "weight": layer.weight, "bias": layer.bias})
    all_close(gradients(again(x.detach()), list(again.parameters())), expected[1:])
    frozen = make(name).requires_grad_(False)
    frozen.load_state_dict({**frozen.state_dict(), "weight": layer.weight, "bias": layer.bias})
    close(gradients(frozen(x), [x])[0], expected[0])


# ---- inputs of unusual sizes ---------------------------------------------------------------------------------------


@every
@in_both_modes
def test_empty_inputs(name, training):
    layer = make(name).train(training)
    before = copy.deepcopy(layer.state_dict())
    x = random_input(0, *SHAPE[1:])
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))
    assert torch.equal(layer.bias.grad, torch.zeros_like(layer.bias))
    assert unchanged(layer, before)


@every
@in_both_modes
def test_empty_spatial_sizes(name, training):
    layer = make(name).train(training)
    before = copy.deepcopy(layer.state_dict())
    for shape in ((4, C, 0), (4, C, 0, 3)):
        assert layer(random_input(*shape)).shape == shape
    assert unchanged(layer, before)


ONE = {
    "GhostBatchNorm": [{"samples_per_group": 1}, {"num_sample_groups": 1}],
    "SeqNorm": [{"num_channel_groups": 1, "num_sample_groups": 1}],
    "BatchGroupNorm": [{"num_groups": C}],
    "GroupedBatchNorm": [{"num_channel_groups": C, "samples_per_group": 1}],
    "BatchRenorm": [{}, {"samples_per_group": 1}],
}


@pytest.mark.parametrize("shape", [(1, C), (1, C, 1, 1)])
@pytest.mark.parametrize(("kind", "options"), [(kind, options) for kind in ONE for options in ONE[kind]])
def test_one_element_has_no_variance(kind, options, shape):
    layer = getattr(dn, kind)(C, **options, dtype=torch.float64)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(random_input(*shape))
    assert unchanged(layer, before)
    assert layer.eval()(random_input(*shape)).isfinite().all()


@every
def test_wrong_inputs_and_arguments(name):
    kind, options, _ = CASES[name]
    layer = make(name)
    before = copy.deepcopy(layer.state_dict())
    for call, message in (
        (lambda: layer(random_input(5, C + 1, 2, 4)), rf"\(N, {C}, …\), got \(5, {C + 1}, 2, 4\)"),
        (lambda: layer(torch.randn(C, dtype=torch.float64)), rf"\(N, {C}, …\), got \({C},\)"),
        (lambda: setattr(layer, "statistics", "batch"), "statistics takes one of.*got 'batch'"),
        (lambda: layer(random_input(*SHAPE), domain=1), "0 to 0, got 1"),
        (lambda: layer([random_input(*SHAPE)] * 2), "num_domains=1 tensors, got 2"),
        (lambda: make(name, num_domains=2)(random_input(*SHAPE)), "num_domains=2 got a single tensor"),
        (lambda: getattr(dn, kind)(0, **options), "0"),
        (lambda: getattr(dn, kind)(C, **options, num_domains=0), "0"),
        (lambda: getattr(dn, kind)(C, **options, affine="none"), "affine takes one of.*got 'none'"),
        (lambda: getattr(dn, kind)(C, **options, sgd_statistics="none"), "sgd_statistics takes one of.*got 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert unchanged(layer, before)


# ---- which statistics normalize ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("renorm")])
def test_minibatch_statistics_in_inference(name):
    layer = make(name)
    x = random_input(*SHAPE)
    expected = layer(x)
    before = copy.deepcopy(layer.state_dict())
    dn.set_statistics(layer, "minibatch").eval()
    close(layer(x), expected)
    assert unchanged(layer, before)


@every
def test_population_statistics_in_training(name):
    layer = make(name)
    layer(random_input(*SHAPE))
    x = random_input(*SHAPE, seed=1)
    expected = layer.eval()(x)
    before = copy.deepcopy(layer.state_dict())
    dn.set_statistics(layer, "population").train()
    y = layer(x)
    close(y, expected)
    assert unchanged(layer, before)
    y.sum().backward()
    assert (layer.bias.grad != 0).all()


@each_kind
def test_a_batch_of_one_sample_in_inference_depends_on_itself_only(name):
    layer = make(name)
    layer(random_input(*SHAPE))
    layer.eval()
    x = random_input(*SHAPE, seed=1)
    close(torch.cat([layer(sample) for sample in x.split(1)]), layer(x))


# ---- domains -------------------------------------------------------------------------------------------------------


def domain_layers(name):
    """A layer of K domains, and K separate layers with its rows."""
    layer = make(name, num_domains=K, affine="per_domain")
    alone = [make(name) for _ in range(K)]
    for k, one in enumerate(alone):
        one.load_state_dict({key: value[k] for key, value in layer.state_dict().items()})
    return layer, alone


def check_domains(layer, alone):
    for key, value in (*layer.named_parameters(), *layer.named_buffers()):
        close(value, torch.stack([getattr(one, key) for one in alone]))


@every
def test_a_list_is_separate_layers(name):
    layer, alone = domain_layers(name)
    buffers = len(alone[0].running_mean)
    assert layer.weight.shape == (K, C) and layer.running_mean.shape == (K, buffers)
    assert layer.num_batches_tracked.shape == (K,)
    for step, counts in enumerate([(4, 5, 2), (3, 0, 4)]):
        xs = [random_input(n, *SHAPE[1:], seed=10 * step + k) * (k + 1) for k, n in enumerate(counts)]
        twins = [clone(x) for x in xs]
        xs = [clone(x) for x in xs]
        ys, expected = layer(xs), [one(x) for one, x in zip(alone, twins, strict=True)]
        all_close(ys, expected)
        y, want = (torch.cat([t.flatten() for t in v]) for v in (ys, expected))
        parameters = [p for one in alone for p in one.parameters()]
        grads = gradients(want, [*twins, *parameters])
        weights, biases = torch.stack(grads[K::2]), torch.stack(grads[K + 1 :: 2])
        all_close(gradients(y, [*xs, layer.weight, layer.bias]), [*grads[:K], weights, biases])
        check_domains(layer, alone)
    layer.eval()
    for k, (x, y) in enumerate(zip(xs, layer(xs), strict=True)):
        close(y, alone[k].eval()(x))
        close(layer(x, domain=k), y)


@every
def test_a_tensor_of_one_domain(name):
    layer, alone = domain_layers(name)
    for step, k in enumerate((1, 2, 1)):
        x = random_input(4, *SHAPE[1:], seed=step)
        close(layer(x, domain=k), alone[k](x))
    check_domains(layer, alone)


@every
@in_both_modes
def test_a_mixed_batch_is_separate_layers(name, training):
    """Each domain's samples are taken in their order; domain 0 has none."""
    layer, alone = domain_layers(name)
    ids = torch.tensor([2, 1, 2, 2, 1, 2, 1])
    x = random_input(7, *SHAPE[1:])
    twin = clone(x)
    layer.train(training)
    y = layer(x, domain=ids)
    expected = torch.zeros_like(y)
    for k, one in enumerate(alone):
        one.train(training)
        if (ids == k).any():
            expected = expected.index_put(((ids == k).nonzero().flatten(),), one(twin[ids == k]))
    close(y, expected)
    close(gradients(y, [x])[0], gradients(expected, [twin])[0])
    check_domains(layer, alone)


@each_kind
def test_one_domain_loads_into_several(name):
    one, several = make(name), make(name, num_domains=2, affine="per_domain")
    one(random_input(*SHAPE))
    several.load_state_dict(one.state_dict())
    x = random_input(*SHAPE, seed=1)
    expected = one.eval()(x)
    for k in range(2):
        close(several.eval()(x, domain=k), expected)


@pytest.mark.slow
@each_kind
def test_lists_and_mixed_batches_compile_to_one_graph(name):
    torch._dynamo.reset()
    eager = make(name, num_domains=2)
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True)
    x, ids = random_input(7, *SHAPE[1:]), torch.tensor([0, 1, 0, 1, 0, 1, 1])
    close(compiled(x, domain=ids), eager(x, domain=ids))
    all_close(compiled(list(x.split([3, 4]))), eager(list(x.split([3, 4]))))


# ---- dtypes, layouts -----------------------------------------------------------------------------------------------


@every
@in_both_modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_have_float32_statistics(name, training, dtype):
    layer = make(name, dtype=torch.float32)
    layer(random_input(*SHAPE, dtype=torch.float32))
    wide = copy.deepcopy(layer).train(training)
    x = random_input(4, C, 4, 4, dtype=dtype) if name != "bgn_pieces" else random_input(*SHAPE, dtype=dtype)
    y, expected = layer.train(training)(x), wide(x.detach().float())
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype), rtol=2e-2, atol=2e-2)
    y.float().square().sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()
    assert layer.weight.grad.dtype == layer.running_var.dtype == torch.float32
    torch.testing.assert_close(layer.running_mean, wide.running_mean)
    torch.testing.assert_close(layer.running_var, wide.running_var)


@every
@in_both_modes
def test_autocast(name, training):
    """The layer's output has its input's type; its statistics are those without autocast."""
    layer = make(name, dtype=torch.float32).train(training)
    plain = copy.deepcopy(layer)
    x = random_input(*SHAPE, dtype=torch.float32)
    expected = plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        half = copy.deepcopy(layer)(x.bfloat16())
    assert y.dtype == torch.float32 and half.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    with torch.autocast("cpu", torch.bfloat16):
        model = nn.Sequential(nn.Conv2d(1, C, 1), copy.deepcopy(layer))
        out = model(torch.randn(5, 1, 2, 4))
    assert out.dtype == torch.bfloat16 and model[1].running_var.dtype == torch.float32
    out.float().square().sum().backward()
    assert model[0].weight.grad.isfinite().all()


@every
@in_both_modes
def test_large_means_in_float32(name, training):
    layer = make(name, dtype=torch.float32, affine=None, momentum=1.0)
    reference = refer(name, momentum=1.0)
    shape = (5, C, 4, 8)
    for step in range(2):
        x = (random_input(*shape, seed=step) + 1e4).detach().float()
        y, expected = layer(x), reference.train(x.double(), None, None)
    if not training:
        y, expected = layer.eval()(x), reference.infer(x.double(), None, None)
    torch.testing.assert_close(y.double(), expected, atol=1e-2, rtol=0)
    torch.testing.assert_close(layer.running_var.double(), reference.var, atol=0, rtol=1e-2)


@every
@in_both_modes
def test_channels_last(name, training):
    layer = make(name)
    layer(random_input(*SHAPE, seed=1))
    twin = copy.deepcopy(layer).train(training)
    layer.train(training)
    x = random_input(*SHAPE)
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    y, expected = layer(last), twin(x)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    close(y, expected)
    all_close(gradients(y, [last, *layer.parameters()]), gradients(expected, [x, *twin.parameters()]))
    for key, value in twin.named_buffers():
        close(layer.get_buffer(key), value)


@each_kind
def test_non_contiguous_inputs(name):
    layer, twin = make(name), make(name)
    twin.load_state_dict(layer.state_dict())
    x = random_input(5, C, 4, 8)[:, :, ::2, ::2]
    assert not x.is_contiguous()
    close(layer(x), twin(x.contiguous()))


@every
@in_both_modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_layers(name, training, dtype):
    layer = make(name, dtype=dtype).train(training)
    x = random_input(*SHAPE, dtype=dtype)
    y = layer(x)
    wide = make(name, dtype=torch.float32).train(training)
    wide.load_state_dict({**wide.state_dict(), "weight": layer.weight.float(), "bias": layer.bias.float()})
    assert y.dtype == layer.running_var.dtype == dtype
    torch.testing.assert_close(y.float(), wide(x.detach().float()), rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(layer.running_var.float(), wide.running_var, rtol=2e-2, atol=2e-2)


# ---- compiled, recomputed ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "renorm_schedule"])
@in_both_modes
def test_compiled_equals_eager(name, training):
    torch._dynamo.reset()
    options = {"r_max": [(0, 1.0), (2, 3.0)], "d_max": [(1, 0.0), (2, 5.0)]} if name == "renorm_schedule" else {}
    eager = make(name.removesuffix("_schedule"), **options)
    eager(random_input(*SHAPE, seed=3))
    compiled = copy.deepcopy(eager).train(training)
    eager.train(training)
    step = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        x = random_input(*SHAPE, seed=seed)
        twin = clone(x)
        y, expected = step(x), eager(twin)
        close(y, expected)
        all_close(gradients(y, [x, *compiled.parameters()]), gradients(expected, [twin, *eager.parameters()]))
        for key, value in eager.named_buffers():
            close(compiled.get_buffer(key), value)


@every
def test_activation_checkpointing_counts_a_step_once(name):
    layer = make(name)
    twin = copy.deepcopy(layer)
    for step in range(2):
        x = random_input(*SHAPE, seed=step)
        other = clone(x)
        y = checkpoint(layer, x, use_reentrant=False)
        expected = twin(other)
        y.pow(3).sum().backward()
        expected.pow(3).sum().backward()
        close(y, expected)
        close(x.grad, other.grad)
        all_close([p.grad for p in layer.parameters()], [p.grad for p in twin.parameters()])
        for key, value in twin.named_buffers():
            close(layer.get_buffer(key), value)
    assert layer.num_batches_tracked == 2


@every
def test_activation_checkpointing_of_two_forwards_is_never_silently_wrong(name):
    """Both run before the backward pass, also with the same input; an error is as good."""
    layer = make(name, momentum=0.5)
    twin = copy.deepcopy(layer)
    x = random_input(*SHAPE)
    other = clone(x)
    (twin(other).pow(3) + twin(other).square()).sum().backward()
    y = checkpoint(layer, x, use_reentrant=False).pow(3) + checkpoint(layer, x, use_reentrant=False).square()
    try:
        y.sum().backward()
    except RuntimeError as error:
        assert "recomputed" in str(error)
    else:
        close(x.grad, other.grad)
        all_close([p.grad for p in layer.parameters()], [p.grad for p in twin.parameters()])


@every
def test_recomputed_population_statistics_are_pooled(name):
    """Batches of unequal size give what one would; those of Batch Renorm too, whose buffers are those of BatchNorm."""
    layer, reference = make(name), refer(name, momentum=1.0)
    batches = [random_input(n, *SHAPE[1:], seed=n).detach() for n in (4, 5, 2)]
    dn.recompute_population_statistics(layer, batches, num_samples=100)
    Reference.update(reference, reference.features(torch.cat(batches)))
    close(layer.running_mean, reference.mean)
    close(layer.running_var, reference.var)


@every
def test_without_gradients_the_buffers_move_all_the_same(name):
    layer, reference = make(name), refer(name)
    x = random_input(*SHAPE)
    with torch.no_grad():
        layer(x)
    reference.train(x.detach(), None, None)
    check_buffers(layer, reference)


def test_recomputation_takes_a_short_last_batch():
    layer = dn.GhostBatchNorm(C, samples_per_group=4, dtype=torch.float64)
    x = random_input(10, C, 3, 3).detach()
    dn.recompute_population_statistics(layer, x.split(8), progress=False)
    close(layer.running_mean, x.mean((0, 2, 3)))
    with pytest.raises(ValueError, match="samples_per_group=4 needs 4 samples"):
        layer(x[:2])
