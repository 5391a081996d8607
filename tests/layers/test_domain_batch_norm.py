import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ReferenceDomainBatchNorm, elements
from torch import nn

import domainnorm as dn
from domainnorm.layers import normalize_layers
from domainnorm.surgery.freeze import freeze_batchnorm

K, C = 3, 4
CHOICES = ("shared", "per_domain")
SIZES = [(2, 6, 5), (3, 3, 4), (2, 2, 1)]


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def make(sgd="per_domain", population="per_domain", affine="shared", domains=K, **options):
    layer = dn.DomainBatchNorm(
        C,
        num_domains=domains,
        sgd_statistics=sgd,
        population_statistics=population,
        affine=affine,
        dtype=torch.float64,
        **options,
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    return layer


def inputs(sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, C, *spatial, dtype=torch.float64, generator=generator) * (k + 1) + k).requires_grad_()
        for k, (n, *spatial) in enumerate(sizes)
    ]


def weighted_sum(ys):
    """A loss whose gradient differs in every element."""
    return sum((y * torch.arange(1.0, y.numel() + 1, dtype=y.dtype).sin().view_as(y)).sum() for y in ys)


def clones(xs):
    return [x.detach().clone().requires_grad_() for x in xs]


# ---- the rows of Table 5 that plain torch can express --------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
def test_row_1_is_batch_norm_of_the_concatenation(momentum):
    layer = make("shared", "shared", "shared", momentum=momentum)
    plain = nn.BatchNorm1d(C, momentum=momentum, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    for step in range(3):
        xs = inputs(seed=step)
        ys = layer(xs)
        twins = clones(xs)
        y = plain(torch.cat([elements(x) for x in twins], 1).t())
        split = y.t().split([x[:, 0].numel() for x in xs], 1)
        expected = [s.view(C, x.shape[0], *x.shape[2:]).transpose(0, 1) for s, x in zip(split, xs, strict=True)]
        compare_step(layer, plain.weight, plain.bias, xs, ys, twins, expected)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            close(getattr(layer, name), getattr(plain, name))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", ["shared", "per_domain"])
def test_rows_3_and_5_are_one_batch_norm_called_for_each_domain(affine, momentum):
    layer = make("per_domain", "shared", affine, momentum=momentum)
    plain = nn.BatchNorm2d(C, momentum=momentum, affine=False, dtype=torch.float64)
    check_separate(layer, [plain] * K, momentum)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", ["shared", "per_domain"])
def test_rows_4_and_6_are_separate_batch_norms(affine, momentum):
    layer = make("per_domain", "per_domain", affine, momentum=momentum)
    plain = [nn.BatchNorm2d(C, momentum=momentum, affine=False, dtype=torch.float64) for _ in range(K)]
    check_separate(layer, plain, momentum)


def check_separate(layer, plain, momentum):
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    for step in range(3):
        xs = inputs(seed=step)
        ys = layer(xs)
        twins = clones(xs)
        expected = [affine_of(weight, bias, k, plain[k](x)) for k, x in enumerate(twins)]
        compare_step(layer, weight, bias, xs, ys, twins, expected)
    shared = plain[0] is plain[1]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        close(
            getattr(layer, name), getattr(plain[0], name) if shared else torch.stack([getattr(p, name) for p in plain])
        )
    layer.eval()
    for p in plain:
        p.eval()
    for k, (x, y) in enumerate(zip(xs, layer(xs), strict=True)):
        close(y, affine_of(weight, bias, k, plain[k](x)))
        close(layer(x, domain=k), y)


def affine_of(weight, bias, k, y):
    w, b = (v if v.ndim == 1 else v[k] for v in (weight, bias))
    return y * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1)


def compare_step(layer, weight, bias, xs, ys, twins, expected):
    for parameter in (layer.weight, layer.bias, weight, bias):
        parameter.grad = None
    for y, e in zip(ys, expected, strict=True):
        close(y, e)
    weighted_sum(ys).backward()
    weighted_sum(expected).backward()
    for x, twin in zip(xs, twins, strict=True):
        close(x.grad, twin.grad)
    close(layer.weight.grad, weight.grad)
    close(layer.bias.grad, bias.grad)


# ---- every combination, empties included, against the slow reference -----------------------------------------------


@given(
    sizes=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 3)), min_size=K, max_size=K),
    sgd=st.sampled_from(CHOICES),
    population=st.sampled_from(CHOICES),
    affine=st.sampled_from(CHOICES),
    momentum=st.sampled_from([0.3, None]),
)
@settings(deadline=None, max_examples=120)
def test_every_combination_equals_the_reference(sizes, sgd, population, affine, momentum):
    counts = [n * h * w for n, h, w in sizes]
    layer = make(sgd, population, affine, momentum=momentum)
    reference = ReferenceDomainBatchNorm(layer)
    xs = inputs(sizes)
    single = sum(counts) == 1 if sgd == "shared" else 1 in counts
    if single:
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(xs)
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
        return
    twins = clones(xs)
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    rows = [[v] * K if v.ndim == 1 else list(v) for v in (weight, bias)]
    for _ in range(2):
        expected = reference.train_step(twins, *rows)
        ys = layer(xs)
    for x, y in zip(xs, ys, strict=True):
        assert y.shape == x.shape
    if sum(counts):
        compare_step(layer, weight, bias, xs, ys, twins, expected)
    mean, var = torch.stack(reference.mean), torch.stack(reference.var)
    close(layer.running_mean, mean[0] if population == "shared" else mean)
    close(layer.running_var, var[0] if population == "shared" else var)
    assert layer.num_batches_tracked.flatten().tolist() == reference.steps


@pytest.mark.parametrize("shape", [(6, C), (3, C, 5), (2, C, 3, 4), (2, C, 2, 3, 2)])
@pytest.mark.parametrize("sgd", CHOICES)
def test_one_domain_is_torch_batch_norm(shape, sgd):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    layer, plain = make(sgd, domains=1), kind(C, dtype=torch.float64)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    compare_step(layer, plain.weight, plain.bias, [x], [layer(x)], [twin], [plain(twin)])
    for name, value in plain.state_dict().items():
        close(layer.state_dict()[name], value)
    close(layer.eval()(x), plain.eval()(x))
    (as_list,) = layer([x])
    close(as_list, layer(x))


# ---- how a layer knows its domain ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sgd", "population", "affine"), list(itertools.product(CHOICES, CHOICES, CHOICES)))
@pytest.mark.parametrize("training", [True, False])
def test_mixed_batch_equals_the_list(sgd, population, affine, training):
    by_list, by_ids = make(sgd, population, affine), make(sgd, population, affine)
    by_ids.load_state_dict(by_list.state_dict())
    ids = torch.tensor([2, 0, 2, 2, 0])  # no sample of domain 1
    x = torch.randn(5, C, 3, 2, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    for layer in (by_list, by_ids):
        layer.train()([torch.randn(2, C, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))] * K)
        layer.train(training)
        layer.zero_grad()
    mixed = by_ids(x, domain=ids)
    separate = by_list([twin[ids == k] for k in range(K)])
    for k in range(K):
        close(mixed[ids == k], separate[k])
    weights = torch.randn_like(mixed)
    (mixed * weights).sum().backward()
    sum((y * weights[ids == k]).sum() for k, y in enumerate(separate)).backward()
    close(x.grad, twin.grad)
    close(by_ids.weight.grad, by_list.weight.grad)
    for name, value in by_list.state_dict().items():
        close(by_ids.state_dict()[name], value)


def test_a_domain_of_a_single_tensor_touches_no_other():
    layer = make()
    layer(torch.randn(4, C, 2, dtype=torch.float64) + 7, domain=1)
    assert layer.num_batches_tracked.tolist() == [0, 1, 0]
    assert (layer.running_mean[[0, 2]] == 0).all() and (layer.running_mean[1] > 0.3).all()


def test_a_nan_stays_in_its_domain():
    layer, xs = make(), [x.detach() for x in inputs()]
    expected = layer(xs)
    xs[1][0, 0, 0, 0] = torch.nan
    ys = layer(xs)
    assert ys[1][:, 0].isnan().all() and layer.running_mean[1, 0].isnan()
    for k in (0, 2):
        close(ys[k], expected[k])
        assert layer.running_mean[k].isfinite().all()


def test_the_domain_must_be_said_and_be_right():
    layer, x = make(), torch.randn(2, C, 3, dtype=torch.float64)
    for call, message in (
        (lambda: layer(x), "num_domains=3 got a single tensor.*domain=k"),
        (lambda: layer([x, x]), "num_domains=3 tensors, got 2"),
        (lambda: layer([x] * 3, domain=1), "leave domain= out"),
        (lambda: layer(x, domain=3), "0 to 2, got 3"),
        (lambda: layer(x, domain=-1), "0 to 2, got -1"),
        (lambda: layer(x, domain=torch.tensor([0, 3])), "0 to 2, got 0 to 3"),
        (lambda: layer(x, domain=torch.tensor([0])), r"shape \(2,\)"),
        (lambda: layer(x, domain=torch.tensor([0.0, 1.0])), "LongTensor"),
        (lambda: layer(x[:, :2], domain=0), r"\(N, 4, …\), got \(2, 2, 3\)"),
        (lambda: layer(x[0, 0], domain=0), r"\(N, 4, …\)"),
        (lambda: dn.DomainBatchNorm(4, num_domains=2, sgd_statistics="none"), "sgd_statistics takes one of"),
        (lambda: dn.DomainBatchNorm(4, num_domains=2, affine="no"), "affine takes one of"),
        (lambda: dn.DomainBatchNorm(0), "positive"),
        (lambda: setattr(layer, "statistics", "batch"), "statistics takes one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert layer.num_batches_tracked.tolist() == [0, 0, 0]


def test_domain_sequential_carries_lists_and_domains():
    plain = nn.Sequential(
        nn.Conv2d(3, C, 3), dn.DomainBatchNorm(C, num_domains=2), nn.ReLU(), nn.Sequential(nn.Conv2d(C, C, 1))
    )
    carrying = dn.DomainSequential(
        nn.Conv2d(3, C, 3), dn.DomainBatchNorm(C, num_domains=2), nn.ReLU(), dn.DomainSequential(nn.Conv2d(C, C, 1))
    )
    carrying.load_state_dict(plain.state_dict())
    xs = [torch.randn(2, 3, 8, 8), torch.randn(1, 3, 5, 6)]
    ys = carrying(xs)
    conv, norm, relu, last = plain
    expected = [last(relu(y)) for y in norm([conv(x) for x in xs])]
    for y, e in zip(ys, expected, strict=True):
        close(y, e)
    carrying.eval()
    for k in range(2):
        close(carrying(xs[k], domain=k), carrying(xs)[k])


# ---- which statistics normalize ------------------------------------------------------------------------------------


def test_minibatch_statistics_in_inference_change_no_buffer():
    layer = make().eval()
    dn.set_statistics(layer, "minibatch")
    before, xs = copy.deepcopy(layer.state_dict()), inputs()
    ys = layer(xs)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    for y, e in zip(ys, layer.train()(xs), strict=True):
        close(y, e)


def test_population_statistics_in_training_change_no_buffer_and_the_affine_learns():
    layer = make(affine="per_domain")
    layer(inputs(seed=5))
    expected = layer.eval()(inputs())
    dn.set_statistics(layer, "population").train()
    before = copy.deepcopy(dict(layer.named_buffers()))
    ys = layer(inputs())
    for y, e in zip(ys, expected, strict=True):
        close(y, e)
    assert all(torch.equal(v, before[k]) for k, v in layer.named_buffers())
    weighted_sum(ys).backward()
    assert (layer.weight.grad != 0).all()


def test_one_element_in_inference_under_minibatch_statistics_is_beta():
    layer = make(affine="per_domain").eval()
    layer.statistics = "minibatch"
    ys = layer(inputs([(1, 1, 1), (2, 3, 3), (0, 2, 2)]))
    close(ys[0].flatten(), layer.bias[0].detach())


def test_set_statistics_reaches_every_layer_and_refuses_torch_batch_norm():
    model = nn.Sequential(make(domains=1), nn.Sequential(make(domains=1)), dn.FrozenBatchNorm(C))
    dn.set_statistics(model, "minibatch")
    assert [model[0].statistics, model[1][0].statistics, model[2].statistics] == [
        "minibatch",
        "minibatch",
        "population",
    ]
    mixed = nn.Sequential(make(domains=1), nn.BatchNorm2d(C))
    with pytest.raises(TypeError, match="1 is torch's BatchNorm2d"):
        dn.set_statistics(mixed, "minibatch")
    assert mixed[0].statistics == "auto"
    with pytest.raises(ValueError, match="statistics takes one of"):
        dn.set_statistics(model, "batch")


def test_frozen_batch_norm_is_constant_in_training_and_inference():
    layer = make(domains=1)
    layer(torch.randn(4, C, 5, dtype=torch.float64) * 3 + 2)
    frozen = freeze_batchnorm(nn.Sequential(layer))[0]
    assert type(layer) is dn.DomainBatchNorm and isinstance(frozen, dn.FrozenBatchNorm)
    x = torch.randn(3, C, 5, dtype=torch.float64, requires_grad=True)
    before = copy.deepcopy(frozen.state_dict())
    for training in (True, False):
        close(frozen.train(training)(x), layer.eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in dn.FrozenBatchNorm(C, train_affine=True).parameters())
    assert frozen.state_dict().keys() == nn.BatchNorm2d(C).state_dict().keys()
    frozen(x).sum().backward()
    close(x.grad, (layer.weight / (layer.running_var + layer.eps).sqrt()).detach().view(1, C, 1).expand_as(x))


# ---- state dicts ---------------------------------------------------------------------------------------------------


def test_statistics_of_one_domain_load_into_each_of_several():
    plain = nn.BatchNorm2d(C)
    plain(torch.randn(4, C, 3, 3) * 2 + 1)
    layer = dn.DomainBatchNorm(C, num_domains=K, affine="per_domain")
    layer.load_state_dict(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[name], torch.stack([value] * K))
    layer.load_state_dict(plain.state_dict(), assign=True)
    with torch.no_grad():
        layer.running_mean[0] = 9  # rows are separate memory
    assert (layer.running_mean[1] != 9).all()


def test_several_domains_into_one_is_an_error_that_names_the_remedy():
    several, one = dn.DomainBatchNorm(C, num_domains=K, affine="per_domain"), dn.DomainBatchNorm(C, num_domains=1)
    with pytest.raises(
        RuntimeError, match=r"running_mean: .*\(3, 4\).*num_domains=3, population_statistics='per_domain'"
    ):
        one.load_state_dict(several.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch"):
        several.load_state_dict(dn.DomainBatchNorm(C, num_domains=2, affine="per_domain").state_dict())


def test_a_checkpoint_without_step_counts_loads():
    state = {k: v for k, v in dn.DomainBatchNorm(C).state_dict().items() if k != "num_batches_tracked"}
    dn.DomainBatchNorm(C).load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deepcopy_and_pickle(copied):
    layer = make("shared", "per_domain", sync=True)
    layer.statistics = "minibatch"
    twin = copied(layer)
    assert repr(twin) == repr(layer) and "statistics='minibatch'" in repr(twin)
    for a, b in zip(layer(inputs()), twin(inputs()), strict=True):
        assert torch.equal(a, b)


# ---- dtypes, layouts, compile --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sgd", CHOICES)
def test_half_inputs_have_float32_statistics(dtype, sgd, training):
    layer = dn.DomainBatchNorm(C, num_domains=2, sgd_statistics=sgd).train(training)
    xs = [(torch.randn(4, C, 9, 9) + 30).to(dtype).requires_grad_() for _ in range(2)]
    wide = copy.deepcopy(layer)
    ys, expected = layer(xs), wide([x.detach().float() for x in xs])
    sum(y.float().square().sum() for y in ys).backward()
    for x, y, e in zip(xs, ys, expected, strict=True):
        assert y.dtype == x.grad.dtype == dtype and x.grad.isfinite().all()
        torch.testing.assert_close(y, e.to(dtype), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.running_var, wide.running_var)
    assert layer.running_var.dtype == layer.weight.grad.dtype == torch.float32


def test_autocast():
    model = dn.DomainSequential(nn.Conv2d(3, C, 3), dn.DomainBatchNorm(C, num_domains=2))
    with torch.autocast("cpu", torch.bfloat16):
        ys = model([torch.randn(2, 3, 8, 8), torch.randn(0, 3, 8, 8)])
    assert ys[0].dtype == torch.bfloat16 and model[1].running_mean.dtype == torch.float32
    sum(y.float().sum() for y in ys).backward()
    assert model[0].weight.grad.isfinite().all()


def test_large_means_in_float32():
    layer = dn.DomainBatchNorm(C, num_domains=2, sgd_statistics="shared", population_statistics="shared", momentum=1.0)
    xs = [torch.randn(4, C, 40, 40) + 1e3 for _ in range(2)]
    exact = torch.cat(xs).double().transpose(0, 1).flatten(1).var(1)
    layer(xs)
    assert ((layer.running_var - exact) / exact).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("sgd", "population"), list(itertools.product(CHOICES, CHOICES)))
def test_compiled_equals_eager(sgd, population):
    torch._dynamo.reset()
    eager = make(sgd, population)
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, backend="aot_eager")
    xs, twins = inputs(), inputs()
    ys, expected = step(xs), eager(twins)
    weighted_sum(ys).backward()
    weighted_sum(expected).backward()
    for x, twin, y, e in zip(xs, twins, ys, expected, strict=True):
        close(y, e)
        close(x.grad, twin.grad)
    for name, value in eager.state_dict().items():
        close(compiled.state_dict()[name], value)


@pytest.mark.slow
def test_domain_ids_compile_to_one_graph():
    torch._dynamo.reset()
    layer = make()
    ids, x = torch.tensor([0, 2, 2]), torch.randn(3, C, 4, dtype=torch.float64)
    step = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    close(step(x, domain=ids), layer(x, domain=ids))


# ---- in step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_in_step_equals_one_after_the_other(training):
    layers = [make(), make("per_domain", "per_domain", "per_domain")]
    twins = copy.deepcopy(layers)
    for layer in (*layers, *twins):
        layer.train(training)
    xs, others = inputs(), inputs(seed=1)
    together = normalize_layers(layers, [xs, others])
    apart = [twins[0](xs), twins[1](others)]
    for a, b in zip(itertools.chain(*together), itertools.chain(*apart), strict=True):
        close(a, b)
    for a, b in zip(layers, twins, strict=True):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_gradcheck_with_an_empty_domain():
    layer = make("shared", "shared", "per_domain")
    assert torch.autograd.gradcheck(lambda *xs: tuple(layer(list(xs))), inputs([(2, 2, 1), (0, 2, 2), (1, 1, 3)]))


def test_forward_passes_by_either_kernel_before_one_backward():
    sizes = [(2, 3, 3), (2, 400, 400), (2, 4, 4), (1, 600, 600)]  # torch's kernel takes the small ones
    layer, plain = dn.DomainBatchNorm(C), nn.BatchNorm2d(C)
    xs = [x.detach().float().requires_grad_() for x in inputs(sizes)]
    for module, own in ((layer, xs), (plain, twins := clones(xs))):
        weighted_sum([module(x) for x in own]).backward()
    for x, twin in zip(xs, twins, strict=True):
        close(x.grad, twin.grad, atol=1e-4)
    close(layer.running_var, plain.running_var, atol=1e-5)
    close(layer.running_mean, plain.running_mean, atol=1e-5)


def test_double_backward_equals_torch():
    layer, plain = make(domains=1), nn.BatchNorm2d(C, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    seconds = []
    for module in (layer, plain):
        x = inputs()[0]
        (grad,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        grad.square().sum().backward()
        seconds.append(x.grad)
    close(*seconds, atol=1e-8)
