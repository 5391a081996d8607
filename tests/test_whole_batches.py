"""Whole normalization batches in one call: what merged rows are, at any shape, in any layout and type, and compiled."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LAYERS, TOLERANCE, TYPES, counted, needs_library, tensor

import domainnorm as dn
from domainnorm import kernels
from domainnorm.layers import by_batch, by_torch

WHOLE = LAYERS | {
    "shared": lambda: dn.DomainBatchNorm(16, 3, "shared", "shared"),
    "per domain": lambda: dn.DomainBatchNorm(16, 3, affine="per_domain"),
    "one after the other": lambda: dn.DomainBatchNorm(16, 3, "per_domain", "shared"),
    "no affine": lambda: dn.DomainBatchNorm(16, affine=None),
    "GroupNorm": lambda: dn.GroupedBatchNorm(16, channel_groups=2, examples_per_group=1),
    "micro-batches": lambda: dn.BatchRenorm(16, group_size=2, allow_smaller_batch=True),
    "corrected domains": lambda: dn.BatchRenorm(16, r_max=1.2, d_max=0.3, num_domains=3, affine="per_domain"),
    "towards one population": lambda: dn.BatchRenorm(
        16, r_max=[(0, 1.1), (9, 2)], num_domains=3, population_statistics="shared", affine=None
    ),
    "one group": lambda: dn.BatchGroupNorm(16, num_groups=1),
}
CORRECTED = ["BatchRenorm", "micro-batches", "corrected domains", "towards one population"]


@pytest.mark.slow
@needs_library
@given(
    name=st.sampled_from(list(WHOLE)),
    samples=st.integers(2, 7),
    size=st.tuples(st.integers(1, 40), st.integers(1, 9)),
    dtype=st.sampled_from(TYPES),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    mean=st.sampled_from([0, 5]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=300)
def test_whole_batches_are_what_merged_rows_are(name, samples, size, dtype, layout, mean, seed):
    wide = dtype if dtype == torch.float64 else torch.float32
    found = []
    for whole, inputs, affine in ((True, dtype, wide), (False, dtype, wide), (False, torch.float64, torch.float64)):
        layer = WHOLE[name]().to(affine)
        for p in layer.parameters():
            p.data.copy_(tensor(p.shape, wide, seed))
        sizes = [size] if layer.num_domains == 1 else [size, (3, 2), (1, 5)]
        xs = [tensor((samples, 16, *of), dtype, seed + k, layout) + mean for k, of in enumerate(sizes)]
        xs = [x.to(inputs).requires_grad_() for x in xs]
        takes = kernels.takes_batches if whole else lambda _: False
        with (
            counted() as calls,
            mock.patch.object(by_torch, "prefers_batch_norm", lambda _: False),
            mock.patch.object(by_batch, "takes_batches", takes),
        ):
            ys = layer(xs if len(xs) > 1 else xs[0])
            ys = ys if isinstance(ys, list) else [ys]
            torch.autograd.backward(ys, [tensor(x.shape, dtype, seed + 7 + k).to(inputs) for k, x in enumerate(xs)])
        assert (calls[0] in ("normalize", "sequence")) == whole
        assert all(y.stride() == x.stride() for y, x in zip(ys, xs, strict=True))
        found.append([*ys, *(x.grad for x in xs), *(p.grad for p in layer.parameters()), *layer.buffers()])
    for ours, rows, exact in zip(*found, strict=True):
        assert ours.dtype == rows.dtype
        # a batch of few numbers, all alike, magnifies what is rounded: in the rows, too
        error, usual = ((v.double() - exact).abs().max() if v.numel() else 0 for v in (ours, rows))
        assert error <= 8 * usual + TOLERANCE[dtype] * (1 + exact.abs().max())


@needs_library
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 30])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_no_number_stays_in_its_channel(layout, place, value):
    x = tensor((2, 16, 40, 40), torch.float32, 0, layout)
    x[1, 3, place, place] = value
    found = []
    for takes in (kernels.takes_batches, lambda _: False):
        layer = dn.GhostBatchNorm(16, num_groups=1)
        with mock.patch.object(by_batch, "takes_batches", takes), counted() as calls:
            found.append((layer(x), *layer.buffers()))
        assert calls[0] == ("normalize" if takes is kernels.takes_batches else "moments")
    y, mean, var, _ = found[0]
    assert not y[:, 3].isfinite().any() and y[:, 4:].isfinite().all()
    assert not mean[3].isfinite() and not var[3].isfinite()
    torch.testing.assert_close(*found, equal_nan=True)


@needs_library
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_batches_share_the_work_among_threads(name, layout):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 4):
            torch.set_num_threads(threads)
            layer = WHOLE[name]()
            xs = [tensor((4, 16, 200, 90 + k), torch.float32, k, layout).requires_grad_() for k in range(3)]
            xs = xs[: layer.num_domains]
            with mock.patch.object(by_torch, "prefers_batch_norm", lambda _: False):
                ys = layer(xs)
            torch.autograd.backward(ys, [tensor(y.shape, torch.float32, 9, layout) for y in ys])
            results.append([*ys, *(x.grad for x in xs), *(p.grad for p in layer.parameters()), *layer.buffers()])
    finally:
        torch.set_num_threads(before)
    for of in results[1:]:
        torch.testing.assert_close(of, results[0], atol=2e-3, rtol=1e-5)


@needs_library
@pytest.mark.parametrize("empty", [(0, 16, 5, 4), (2, 16, 0, 4), (2, 16, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("choice", ["shared", "per_domain"])
def test_tensors_of_either_layout_go_with_the_others(choice, layout, empty):
    layer = dn.DomainBatchNorm(16, 3, choice, choice).double()
    shapes = [(3, 16, 6, 4), empty, (2, 16, 3, 3)]
    xs = [tensor(shape, torch.float64, k, layout).requires_grad_() for k, shape in enumerate(shapes)]
    apart = [x[:, 1] for x in xs]
    with counted() as calls, mock.patch.object(by_torch, "prefers_batch_norm", lambda _: False):
        ys = layer(xs)
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert calls == ["normalize", "normalize_gradient"]
    for k, (y, x) in enumerate(zip(ys, apart, strict=True)):
        of = torch.cat([v.flatten() for v in apart]) if choice == "shared" else apart[k]
        if x.numel():
            torch.testing.assert_close(y[:, 1], (x - of.mean()) / (of.var(correction=0) + 1e-5).sqrt())
    assert all(y.stride() == x.stride() for y, x in zip(ys, xs, strict=True) if x.numel())


@needs_library
@pytest.mark.parametrize("mean", [1e3, 1e4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["GhostBatchNorm", "GroupedBatchNorm", "SeqNorm", "BatchGroupNorm"])
def test_whole_batches_at_large_means(name, layout, mean):
    x = (tensor((4, 16, 90, 100), torch.float64, 0) + mean).float().contiguous(memory_format=layout)
    layer, exact = LAYERS[name](), LAYERS[name]().double()
    torch.testing.assert_close(layer(x).double(), exact(x.double()), atol=mean * 2e-6, rtol=1e-4)


@needs_library
@pytest.mark.parametrize("name", [name for name in WHOLE if name not in CORRECTED])
def test_whole_batches_have_second_derivatives(name):
    layer = WHOLE[name]().double()
    layer.momentum = 0.0  # each run is the same
    xs = [tensor((4, 16, 3, 2), torch.float64, k).requires_grad_() for k in range(layer.num_domains)]
    names, weights = zip(*layer.named_parameters(), strict=True) if layer.affine else ((), ())

    def run(*given):
        with mock.patch.object(by_torch, "prefers_batch_norm", lambda _: False):
            affine = dict(zip(names, given[len(xs) :], strict=True))
            return tuple(torch.func.functional_call(layer, affine, (list(given[: len(xs)]),)))

    assert torch.autograd.gradgradcheck(run, (*xs, *weights), atol=1e-6, nondet_tol=1e-9, fast_mode=True)


@needs_library
@pytest.mark.parametrize("name", CORRECTED)
def test_second_derivatives_of_what_has_constants(name):  # r and d, so that numbers cannot tell
    penalties = []
    for takes in (kernels.takes_batches, lambda _: False):
        layer = WHOLE[name]().double()
        xs = [tensor((4, 16, 3, 2), torch.float64, k).requires_grad_() for k in range(layer.num_domains)]
        with mock.patch.object(by_batch, "takes_batches", takes):
            grads = torch.autograd.grad(sum(y.pow(3).sum() for y in layer(xs)), xs, create_graph=True)
        penalty = sum(grad.pow(2).sum() for grad in grads)
        penalties.append(torch.autograd.grad(penalty, [*xs, *layer.parameters()], allow_unused=True))
    torch.testing.assert_close(*penalties)


@needs_library
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("affine", ["shared", "per_domain", None])
@pytest.mark.parametrize("kind", [dn.DomainBatchNorm, dn.BatchRenorm])
def test_no_samples_at_all(kind, affine, create_graph):
    layer = kind(16, num_domains=3, affine=affine)
    xs = [torch.randn(0, 16, 3, 3, requires_grad=True) for _ in range(2)]
    with counted() as calls:
        ys = layer(xs, domain=[0, 2])
    assert calls == ["normalize"]
    of = [*xs, *layer.parameters()]
    for grad, v in zip(torch.autograd.grad(sum(y.sum() for y in ys), of, create_graph=create_graph), of, strict=True):
        assert grad.shape == v.shape and not grad.any()


@needs_library
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", WHOLE)
def test_layers_of_half_types(name, layout):
    found = []
    for takes in (kernels.takes_batches, lambda _: False):
        layer = WHOLE[name]().bfloat16()
        xs = [tensor((4, 16, 9, 7), torch.bfloat16, k, layout).requires_grad_() for k in range(layer.num_domains)]
        with mock.patch.object(by_batch, "takes_batches", takes):
            for _ in range(2):
                ys = layer(xs)
        torch.autograd.backward(ys, [tensor(y.shape, torch.bfloat16, 9, layout) for y in ys])
        found.append([*ys, *(x.grad for x in xs), *layer.buffers()])
    torch.testing.assert_close(*found, atol=5e-2, rtol=2e-2)


@needs_library
@pytest.mark.parametrize("affine", ["shared", "per_domain", None])
@pytest.mark.parametrize("choices", [("shared", "shared"), ("per_domain", "per_domain"), ("per_domain", "shared")])
def test_a_compiled_layer_calls_the_kernel(choices, affine):
    torch._dynamo.reset()
    if torch.compile(lambda x: x + torch.compiler.is_exporting(), backend="eager")(torch.zeros(1)):
        pytest.skip("this torch compiles as if it exported: layers are operations of torch then")
    eager = dn.DomainBatchNorm(64, 2, *choices, affine=affine)
    twin = copy.deepcopy(eager)
    step = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for height in (60, 61, 75):
        xs, others = (
            [tensor((2, 64, height - 3 * k, 50), torch.float32, k).requires_grad_() for k in range(2)] for _ in range(2)
        )
        grads = [tensor(x.shape, torch.float32, 7) for x in xs]
        expected = eager(xs)
        torch.autograd.backward(expected, grads)
        with counted() as calls:
            ys = step(others)
            torch.autograd.backward(ys, grads)
        assert calls == ["normalize", "normalize_gradient"]
        torch.testing.assert_close(ys, expected)
        torch.testing.assert_close([x.grad for x in others], [x.grad for x in xs])
    gradients = ([p.grad for p in of.parameters()] for of in (twin, eager))
    torch.testing.assert_close(*gradients, atol=1e-2, rtol=1e-4)  # sums of 6000 numbers
    torch.testing.assert_close(list(twin.buffers()), list(eager.buffers()))


@needs_library
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_operator_keeps_the_rules_of_torch(layout, rows):
    xs = [tensor((2, 8, 5 + k, 3), torch.float64, k, layout) for k in range(2)]
    weight, bias = (tensor((4, 8) if rows else (8,), torch.float64, k) for k in range(2))
    torch.library.opcheck(torch.ops.domainnorm.normalize, (xs, weight, bias, [0, 1], 2, 1e-5))
    moments = torch.ops.domainnorm.normalize(xs, weight, bias, [0, 1], 2, 1e-5)[-1]
    grads = [torch.ones_like(x) for x in xs]
    given = (grads, xs, moments, weight, bias, [0, 1], 1e-5)
    torch.library.opcheck(torch.ops.domainnorm.normalize_gradient, given)


@needs_library
def test_the_operator_with_a_single_sample_of_all_domains():
    layer = dn.DomainBatchNorm(4, 2, affine="per_domain").double()
    gradients = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        xs = [tensor((n, 4, 400, 300), torch.float64, n).requires_grad_() for n in (1, 0)]
        layer.zero_grad()
        call(xs)[0].pow(2).sum().backward()
        gradients.append([xs[0].grad, layer.weight.grad, layer.bias.grad])
    torch.testing.assert_close(*gradients)


@needs_library
def test_an_exported_model_has_operations_of_torch_alone():
    model = torch.nn.Sequential(dn.DomainBatchNorm(64)).train()
    program = torch.export.export(model, (torch.randn(2, 64, 70, 70),))
    assert not [node for node in program.graph.nodes if "domainnorm" in str(node.target)]
