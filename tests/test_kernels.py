"""Compiled kernels equal the plain ones, and are the ones that run."""

import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LAYERS, TOLERANCE, TYPES, counted, needs_library, tensor
from torch import nn
from torch.autograd import forward_ad

import domainnorm as dn
from domainnorm import kernels
from domainnorm.kernels import compiled, library, plain
from domainnorm.moments import Moments, Rows


def layouts(shape):
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    return [torch.contiguous_format, *([last[len(shape)]] if len(shape) in last else [])]


def assert_equal_kernels(xs, numbers, seed=0):
    """All four functions, `numbers` being scale, centre, shift and one more."""
    dtype = xs[0].dtype
    grads = [tensor(x.shape, dtype, seed + k).as_strided(x.shape, x.stride()) for k, x in enumerate(xs)]
    scale, centre, shift, other = numbers
    full = [v.expand(sum(map(len, xs)), v.shape[-1]) for v in numbers]
    tolerance = TOLERANCE[dtype]
    with torch.no_grad():
        for name, *args in (
            ("moments", xs),
            ("affine", xs, scale, centre, shift),
            ("sums", grads, xs, centre),
            ("gradient", grads, xs, scale, full[1], full[2], full[3]),
            ("gradient", None, xs, None, full[1], full[2], full[3]),
        ):
            ours, expected = (getattr(kernel, name)(*args) for kernel in (compiled, plain))
            if name in ("affine", "gradient"):
                assert all(y.stride() == x.stride() for y, x in zip(ours, xs, strict=True) if x.numel())
            for one, other in zip(ours, expected, strict=True):
                assert one.dtype == other.dtype and one.shape == other.shape
                size = 1 + (max(x[0, 0].numel() if len(x) else 0 for x in xs) ** 0.5 if name == "sums" else 0)
                atol = (tolerance if name in ("affine", "gradient") else min(tolerance, 2e-5)) * size * 4
                torch.testing.assert_close(one, other, atol=atol, rtol=tolerance)


@pytest.mark.slow
@needs_library
@given(
    sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 70), st.integers(1, 9)), min_size=1, max_size=4),
    channels=st.integers(1, 70),
    dtype=st.sampled_from(TYPES),
    kind=st.sampled_from(["rows", "row", "channels"]),
    threads=st.sampled_from([1, 3]),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=150)
def test_compiled_equals_plain(sizes, channels, dtype, kind, threads, last, seed):
    layout = torch.channels_last if last else torch.contiguous_format
    xs = [tensor((n, channels, h, w), dtype, seed + k, layout) for k, (n, h, w) in enumerate(sizes)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = {"rows": (sum(n for n, _, _ in sizes), channels), "row": (1, channels), "channels": (channels,)}[kind]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert library.takes(xs)
        assert_equal_kernels(xs, [tensor(rows, wide, seed + 7 + k) for k in range(4)], seed)
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "shape", [(5, 3), (2, 3, 20_001), (2, 3, 8192), (2, 130, 70, 90), (3, 4, 2, 3, 5), (1, 1, 1), (4, 700, 33)]
)
def test_long_and_odd_rows(shape, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for layout in layouts(shape):
        x = tensor(shape, dtype, 0, layout)
        assert_equal_kernels([x], [tensor(shape[:2], wide, k) for k in range(4)])


@needs_library
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_threads_share_the_work(layout):  # of tensors that have enough for several
    x, grad = (tensor((3, 130, 60, 50), torch.float32, seed, layout) for seed in range(2))
    numbers = [tensor((3, 130), torch.float32, seed) for seed in range(4)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 4):
            torch.set_num_threads(threads)
            results.append(
                [
                    *compiled.moments([x]),
                    *compiled.affine([x], *numbers[:3]),
                    *compiled.sums([grad], [x], numbers[0]),
                    *compiled.gradient([grad], [x], *numbers),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for of in results[1:]:
        torch.testing.assert_close(of, results[0], atol=1e-3, rtol=1e-5)


@needs_library
@pytest.mark.parametrize("mean", [1e3, 1e4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_means_cost_no_precision(mean, layout):
    x = (tensor((4, 8, 90, 100), torch.float64, 0) + mean).float().contiguous(memory_format=layout)
    _, var = compiled.moments([x])
    torch.testing.assert_close(var.double(), x.double().var((2, 3), correction=0), rtol=mean * 2e-8, atol=0)


@needs_library
def test_bfloat16_is_rounded_as_torch_does():
    x = (
        torch.tensor([1.0, -2.5, float("nan"), float("inf"), 3e38, 1e-40, 0.1, 1.00390625] * 5)
        .bfloat16()
        .view(1, 1, -1)
    )
    scale = torch.tensor([[1.003]])
    expected = (x.float() * scale).bfloat16()
    (y,) = compiled.affine([x], scale, torch.zeros(1), torch.zeros(1))
    torch.testing.assert_close(y, expected, atol=0, rtol=0, equal_nan=True)


@needs_library
def test_installation_has_compiled_the_kernels():
    assert library._LIBRARY is not None, "pip install -e . had a compiler, but there is no library"


@needs_library
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_takes_the_fast_path(name, layout):
    layer = LAYERS[name]()
    x = tensor((6, 16, 112, 112), torch.float32, 0, layout).requires_grad_()
    function = "sequence" if name == "SeqNorm" else "normalize"
    with counted() as calls:
        y = layer(x)
        assert calls == [function]
        y.backward(torch.ones_like(y))
    assert calls == [function, f"{function}_gradient"]


@needs_library
@pytest.mark.parametrize("choice", ["shared", "per_domain"])
def test_all_levels_take_one_call_each_way(choice):
    layer = dn.DomainBatchNorm(256, 5, choice, choice)
    levels = [tensor((2, 256, 64 >> k, 80 >> k), torch.float32, k).requires_grad_() for k in range(5)]
    with counted() as calls:
        torch.autograd.backward(layer(levels), [torch.ones_like(x) for x in levels])
    assert calls == ["normalize", "normalize_gradient"]


@needs_library
def test_what_is_no_whole_batch_is_read_once_and_written_once():
    layer = dn.DomainBatchNorm(16, 2)
    x = tensor((6, 16, 112, 112), torch.float32, 0).requires_grad_()
    with counted() as calls:
        y = layer(x, domain=torch.tensor([0, 1, 1, 0, 0, 1]))
        y.backward(torch.ones_like(y))
    assert calls == ["moments", "affine", "sums", "gradient"]


@needs_library
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_example_weighing_is_one_call(layout):
    layer = dn.DomainBatchNorm(16).eval()
    layer.running_mean.normal_(), layer.running_var.uniform_(1, 2)
    layer.example_weight = 0.3
    for shape in ((6, 16, 9, 40), (6, 16, 1, 1)):
        x = tensor(shape, torch.float32, 0, layout)
        with torch.no_grad(), counted() as calls:
            y = layer(x)
        assert calls == ["weighed"]
        torch.testing.assert_close(y, layer(x).detach())  # differentiable: row by row


@needs_library
def test_a_plain_batch_norm_takes_the_faster_of_ours_and_torchs():
    layer = dn.DomainBatchNorm(16)
    small, large = (tensor((8, 16, side, side), torch.float32, 0) for side in (8, 112))
    short = tensor((10_000, 16, 2, 2), torch.float32, 0)
    last = large.contiguous(memory_format=torch.channels_last)
    for x, ours in ((small, False), (short, False), (large, True), (last, True), (last.bfloat16(), True)):
        assert kernels.prefers_batch_norm(x) != ours
        with counted() as calls, mock.patch.object(F, "batch_norm", wraps=F.batch_norm) as torchs:
            y = layer(x)
        assert bool(calls) == ours and torchs.called != ours
        expected = F.batch_norm(x.double(), None, None, training=True).to(x.dtype)
        tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)


@needs_library
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_large_mean_costs_a_plain_batch_norm_no_precision(layout):
    x = (torch.randn(8, 16, 112, 112, generator=torch.manual_seed(0)) + 1e4).contiguous(memory_format=layout)
    expected = F.batch_norm(x.double(), None, None, training=True).float()
    # the mean is kept in single precision, which at 1e4 is to 5e-4; torch in channels_last is off by 5
    torch.testing.assert_close(dn.DomainBatchNorm(16)(x).detach(), expected, atol=1e-3, rtol=0)


def test_what_is_differentiated_or_compiled_is_of_torchs_operations():
    x = torch.randn(2, 3, 4)
    with torch.enable_grad():
        assert kernels.kernel([x]) is plain
    with torch.no_grad():
        for strange in (x.transpose(0, 2), x.half(), x.to(torch.complex64), x.to("meta")):
            assert kernels.kernel([strange]) is plain
        assert kernels.kernel([x, x.double()]) is plain


@pytest.mark.parametrize("name", LAYERS)
def test_without_a_library_results_are_the_same(name):
    layer, twin = LAYERS[name](), LAYERS[name]()
    results = []
    for one, of in ((layer, library._LIBRARY), (twin, None)):
        x = tensor((6, 16, 9, 7), torch.float64, 0).requires_grad_()
        with mock.patch.object(library, "_LIBRARY", of):
            y = one.double()(x)
            y.backward(tensor(y.shape, torch.float64, 1))
        results.append((y, x.grad, *(p.grad for p in one.parameters()), *one.buffers()))
    torch.testing.assert_close(*results, atol=1e-11, rtol=1e-11)


@needs_library
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_torchs_transforms_see_a_large_plain_batch_norm(layout):
    layer, peer = dn.DomainBatchNorm(16), nn.BatchNorm2d(16)
    x, tangent = (tensor((8, 16, 80, 80), torch.float32, seed, layout) for seed in (0, 1))
    results = []
    for of in (layer, peer):
        with forward_ad.dual_level():
            results.append(forward_ad.unpack_dual(of(forward_ad.make_dual(x, tangent))).tangent)
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    layer.eval().statistics = "minibatch"
    parameters = dict(layer.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(parameters)
    layer(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(grads[name], parameter.grad, atol=0.5, rtol=1e-4)


KINDS = ["default", "avx2", "avx512"]


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", KINDS[: KINDS.index(library.processor()) + 1])
def test_the_libraries_of_lesser_processors_compute_the_same(kind, name, layout, dtype):
    if (of := library.load(kind)) is None:
        pytest.skip(f"not built for {kind}")
    layer, twin = LAYERS[name](), LAYERS[name]()
    results = []
    for one, chosen in ((layer, of), (twin, None)):
        x = tensor((6, 16, 9, 37), dtype, 0, layout).requires_grad_()
        with mock.patch.object(library, "_LIBRARY", chosen):
            y = one(x)
            y.backward(tensor(y.shape, dtype, 1, layout))
        results.append((y, x.grad, *one.buffers()))
    torch.testing.assert_close(*results, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("population", ["shared", "per_domain"])
@pytest.mark.parametrize("kind", [dn.DomainBatchNorm, dn.BatchRenorm])
def test_compiled_statistics_move_as_the_plain_ones_do(kind, population, momentum, dtype):
    layers = [kind(5, num_domains=3, population_statistics=population, momentum=momentum).to(dtype) for _ in range(2)]
    table = tensor((2, 3, 5), dtype, 1).abs()
    for counts in ([9, 1, 0], [1, 7, 2], [0, 0, 0], [5, 0, 3]):
        with mock.patch.object(compiled, "ema", wraps=compiled.ema) as fast:
            layers[0]._update_known(table, counts)
        layers[1]._update_population(Moments.of(table, counts))
        assert fast.called
        for ours, expected in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
            torch.testing.assert_close(ours, expected, atol=TOLERANCE[dtype] / 10, rtol=TOLERANCE[dtype] / 10)
        table = table + 1
    assert layers[0].num_batches_tracked.sum() == 7


@needs_library
def test_autograd_sees_that_compiled_statistics_moved():
    layer = dn.DomainBatchNorm(3, momentum=None)
    x = torch.randn(4, 3, 90, 90, requires_grad=True)
    y = x * layer.running_var.view(3, 1, 1)
    with mock.patch.object(compiled, "ema", wraps=compiled.ema) as fast:
        layer(torch.randn(4, 3, 200, 200))
    assert fast.called
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_library
def test_a_library_of_another_source_is_not_used(tmp_path):
    changed = tmp_path / "rows.cpp"
    changed.write_bytes(library.SOURCE[-1].read_bytes() + b"// changed\n")
    with (
        mock.patch.object(library, "SOURCE", [*library.SOURCE[:-1], changed]),
        pytest.warns(UserWarning, match="another version of its source"),
    ):
        assert library.load(library.processor()) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.load(library.processor()) is not None


@needs_library
@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="torch has none")
def test_kernels_run_on_the_threads_that_torch_has():
    team = library._team()
    assert team is not None and all(getattr(team, name) for name in library.OPENMP)


def test_rows_are_written_once():
    rows = Rows([torch.randn(2, 3, 4)])
    of = rows.moments
    rows.normalize(of, None, None, 1e-5)
    with pytest.raises(RuntimeError, match="written once"):
        rows.normalize(of, None, None, 1e-5)


def test_a_backward_pass_through_the_moments_alone():
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    rows = Rows([x])
    (y,) = rows.normalize(rows.moments.merge(0), None, None, 1e-5)
    (weights,) = torch.autograd.grad(y.pow(2).sum(), [rows.moments.var], retain_graph=True)
    (grad,) = torch.autograd.grad(rows.moments.var.sum(), [x])
    torch.testing.assert_close(grad, 2 / 5 * (x - x.mean(2, keepdim=True)).detach())
    assert weights.isfinite().all()


def test_several_backward_passes_and_unused_outputs():
    def run(layer, twin):
        xs = [torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        ys = layer(xs)
        expected = [twin(x) for x in xs]
        for k in (0, 1, 0):  # one output each time, the other is not used
            for of in (ys, expected):
                for x in xs:
                    x.grad = None
                of[k].pow(3).sum().backward(retain_graph=True)
                grads = [None if x.grad is None else x.grad.clone() for x in xs]
                if of is ys:
                    ours = grads
            torch.testing.assert_close(ours[k], grads[k])
            assert ours[1 - k] is None or not ours[1 - k].any()

    run(dn.DomainBatchNorm(4, 2, momentum=None).double(), nn.BatchNorm2d(4).double())
