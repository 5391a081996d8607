"""Run by test_triton.py in a process of its own, in Triton's interpreter: kernels for GPUs, on tensors of the CPU."""

import logging
import math
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import tensor, training_step

import domainnorm as dn
from domainnorm.ops import eager, select, triton
from domainnorm.ops.triton import kernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CPU = torch.device("cpu")


@pytest.fixture
def small_blocks():
    """So that rows have several blocks, and pieces several of them."""
    with mock.patch.object(kernels, "BLOCK", 16), mock.patch.object(kernels, "PROGRAMS", 12):
        yield


def reference(xs, grads, scale, center, shift, slope, offset):
    """What the four functions compute, in float64."""
    xs, grads = ([v.double() for v in values] for values in (xs, grads))
    rows = (sum(map(len, xs)), xs[0].shape[1])
    sizes = [len(x) for x in xs]
    values = [v.double().expand(rows).split(sizes) for v in (scale, center, shift, slope, offset)]
    of_tensors = [[v[..., None, None] for v in own] for own in zip(*values, strict=True)]
    moments, ys, totals, products, to_xs = [], [], [], [], []
    for x, grad, (scale, center, shift, slope, offset) in zip(xs, grads, of_tensors, strict=True):
        moments.append(torch.stack(eager.moments([x], [None])))
        ys.append(scale * (x - center) + shift)
        totals.append(grad.sum((2, 3)))
        products.append((grad * (x - center)).sum((2, 3)))
        to_xs.append(scale * grad + slope * (x - center) + offset)
    return [*torch.cat(moments, 1), *ys, torch.cat(totals), torch.cat(products), *to_xs]


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(1, 7)), min_size=1, max_size=4),
    channels=st.integers(1, 3),
    dtype=st.sampled_from(list(TOLERANCE)),
    lengths=st.lists(st.sampled_from(["rows", "row", "channels"]), min_size=5, max_size=5),
)
# pieces of several blocks, one of them beyond the end; one row; blocks that are full; nothing at all
@example([(1, 13, 11), (0, 3, 3), (2, 2, 9)], 1, torch.float32, ["rows"] * 5)
@example([(1, 10, 40)], 1, torch.bfloat16, ["row"] * 5)
@example([(2, 8, 8), (1, 0, 3), (1, 1, 1)], 2, torch.float16, ["channels"] * 5)
@example([(0, 4, 9)], 3, torch.float32, ["channels"] * 5)
def test_they_equal_the_eager_ones(sizes, channels, dtype, lengths):
    xs = [tensor((n, channels, h, w), dtype, k) for k, (n, h, w) in enumerate(sizes)]
    # gradients in another memory format and dtype are as good
    layout = torch.channels_last if channels == 2 else torch.contiguous_format
    grads = [tensor(x.shape, dtype, 10 + k, layout) for k, x in enumerate(xs)]
    samples, rows = [None] * len(xs), sum(map(len, xs))
    shapes = {"rows": (rows, channels), "row": (1, channels), "channels": (channels,)}
    values = [tensor(shapes[length], torch.float32, 20 + k) for k, length in enumerate(lengths)]
    scale, center, shift, slope, offset = values
    found = [
        *triton.moments(xs, samples),
        *triton.affine(xs, samples, scale, center, shift),
        *triton.sums(grads, xs, samples, center),
        *triton.gradient(grads, xs, samples, scale, center, slope, offset),
    ]
    expected = reference(xs, grads, *values)
    size = max(1, *(math.prod(x.shape[2:]) for x in xs))
    sums = range(2 + len(xs), 4 + len(xs))
    for k, (ours, other) in enumerate(zip(found, expected, strict=True)):
        of_rows = k < 2 or k in sums
        assert ours.dtype == (torch.float32 if of_rows else dtype) and ours.shape == other.shape
        tolerance = 1e-5 if of_rows else TOLERANCE[dtype]
        atol = tolerance * 4 * (size if k in sums else 1)
        torch.testing.assert_close(ours.double(), other, rtol=tolerance, atol=atol)


def test_values_of_another_shape_are_refused():
    x = tensor((2, 3, 4, 5), torch.float32, 0)
    right = torch.ones(2, 3)
    for shape in ((), (6,), (2, 1), (1, 2), (3, 3)):
        with pytest.raises(RuntimeError, match="expected values for 2 x 3 rows"):
            triton.affine([x], [None], right, right, torch.ones(shape))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mean", [1e4, -1e5])
def test_a_large_mean_costs_no_precision(mean):
    x = (tensor((1, 2, 30, 40), torch.float64, 0) + mean).float()
    found_mean, found_var = triton.moments([x], [None])
    torch.testing.assert_close(found_mean, x.double().mean((2, 3)).float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(found_var, x.double().var((2, 3), correction=0).float(), rtol=2e-5, atol=0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("place", [(4, 4), (0, 0)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(value, place):
    x = tensor((2, 3, 9, 9), torch.float32, 0)
    x[1, 2, place[0], place[1]] = value
    mean, var = triton.moments([x], [None])
    for found in (mean, var):
        assert not found[1, 2].isfinite() and found.isfinite().sum() == 5
    ones, zeros = torch.ones(2, 3), torch.zeros(2, 3)
    (y,) = triton.affine([x], [None], ones, zeros, zeros)
    total, products = triton.sums([x], [x], [None], zeros)
    (to_x,) = triton.gradient([x], [x], [None], ones, zeros, ones, zeros)
    assert y.isfinite().sum() == to_x.isfinite().sum() == x.numel() - 1
    assert total.isfinite().sum() == products.isfinite().sum() == 5


LAYERS = {  # of one tensor
    "BN, cumulative": lambda: dn.DomainBatchNorm(4, momentum=None),
    "BN without affine": lambda: dn.DomainBatchNorm(4, affine=None),
    "BN of mixed domains": lambda: dn.DomainBatchNorm(4, num_domains=3),
    "GhostBN": lambda: dn.GhostBatchNorm(4, samples_per_group=2),
    "GhostBN, an uneven group": lambda: dn.GhostBatchNorm(4, samples_per_group=3),
    "SeqNorm": lambda: dn.SeqNorm(4, num_channel_groups=2, num_sample_groups=2),
    "BGN": lambda: dn.BatchGroupNorm(4, num_groups=2),
    "BGN, channels split in space": lambda: dn.BatchGroupNorm(4, num_groups=12),
    "GBGN": lambda: dn.GroupedBatchNorm(4, num_channel_groups=2, samples_per_group=2),
    "BRN": lambda: dn.BatchRenorm(4),
    "BRN in groups": lambda: dn.BatchRenorm(4, samples_per_group=2),
    "example weighing": lambda: dn.set_example_weight(dn.DomainBatchNorm(4), 0.3).eval(),
}
LISTS = {  # of three tensors
    "BN, shared": lambda: dn.DomainBatchNorm(4, num_domains=3, sgd_statistics="shared", population_statistics="shared"),
    "BN, shared, statistics per domain": lambda: dn.DomainBatchNorm(
        4, num_domains=3, sgd_statistics="shared", population_statistics="per_domain"
    ),
    "BN, per domain, affine too": lambda: dn.DomainBatchNorm(4, num_domains=3, affine="per_domain"),
    "GhostBN, per domain": lambda: dn.GhostBatchNorm(4, samples_per_group=2, num_domains=3),
}
DOMAINS = {"BN of mixed domains": torch.tensor([2, 0, 1, 0])}


@pytest.mark.parametrize("name", [*LAYERS, *LISTS])
def test_layers_made_of_them(name, monkeypatch, caplog):
    """A training step."""
    monkeypatch.setattr(triton, "refusal", lambda xs: "")
    caplog.set_level(logging.DEBUG, select.logger.name)
    make = (LISTS if name in LISTS else LAYERS)[name]
    shapes = [(4, 4, 3, 5), *([(3, 4, 6, 2), (2, 4, 1, 1)] if name in LISTS else [])]
    xs = [tensor(shape, torch.float32, k) for k, shape in enumerate(shapes)]
    found = []
    for backend in ("triton", "eager"):
        monkeypatch.setenv(select.VARIABLE, backend)
        layer = make()
        with torch.no_grad():
            for k, p in enumerate(layer.parameters()):
                p.copy_(tensor(p.shape, torch.float32, 30 + k))
        found.append(training_step(layer, xs if name in LISTS else xs[0], domain=DOMAINS.get(name)))
        assert {record.getMessage().split()[0] for record in caplog.records} == {backend}
        caplog.clear()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "default"), zip(triton.DTYPES, (torch.float64, torch.float32, torch.bfloat16), strict=True)
)
def test_a_process_tries_them_before_it_uses_them(dtype, default, recwarn):
    torch.set_default_dtype(default)
    try:
        with torch.inference_mode(), torch.autocast("cpu"):
            assert triton.failure(CPU, dtype) == ""
    finally:
        torch.set_default_dtype(torch.float32)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["moments", "affine", "sums", "gradient"])
def test_wrong_kernels_are_found(name, monkeypatch):
    right = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *args: [1.1 * v for v in right(*args)])
    with pytest.warns(UserWarning, match="without Triton's kernels, and is slower: AssertionError"):
        assert triton.failure(CPU, torch.float32).startswith("AssertionError")


def test_a_full_memory_is_no_failure_of_the_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "moments", mock.Mock(side_effect=torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        triton.failure(CPU, torch.float32)
