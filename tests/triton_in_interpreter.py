"""Run by test_triton.py in a process of its own, in Triton's interpreter: kernels for GPUs, on tensors of the CPU."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LAYERS, tensor

import domainnorm as dn
from domainnorm import moments
from domainnorm.kernels import gpu, plain, triton_rows
from domainnorm.layers import by_batch, in_step

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture
def small_blocks():
    """So that rows have several blocks, and pieces several of them."""
    with mock.patch.object(triton_rows, "BLOCK", 16), mock.patch.object(triton_rows, "PROGRAMS", 12):
        yield


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=4),
    channels=st.integers(1, 5),
    dtype=st.sampled_from(list(TOLERANCE)),
    of_rows=st.lists(st.sampled_from(["rows", "row", "channels"]), min_size=4, max_size=4),
)
def test_they_equal_the_plain_ones(sizes, channels, dtype, of_rows):
    xs = [tensor((n, channels, h, w), dtype, k) for k, (n, h, w) in enumerate(sizes)]
    grads = [tensor(x.shape, dtype, 10 + k) for k, x in enumerate(xs)]
    rows = sum(map(len, xs))
    shapes = {"rows": (rows, channels), "row": (1, channels), "channels": (channels,)}
    scale, centre, shift, other = (tensor(shapes[of], torch.float32, 20 + k) for k, of in enumerate(of_rows))
    full = [v.expand(rows, channels) for v in (centre, shift, other)]
    tolerance = TOLERANCE[dtype]
    for name, *args in (
        ("moments", xs),
        ("affine", xs, scale, centre, shift),
        ("sums", grads, xs, centre),
        ("scaled", grads, xs, scale),
        ("gradient", grads, xs, scale, *full),
        ("gradient", None, xs, None, *full),
    ):
        ours, expected = (getattr(module, name)(*args) for module in (triton_rows, plain))
        for one, reference in zip(ours, expected, strict=True):
            assert one.dtype == reference.dtype and one.shape == reference.shape
            of = 1e-5 if name in ("moments", "sums") else tolerance
            size = max(math.prod(x.shape[2:]) for x in xs) if name == "sums" else 1
            torch.testing.assert_close(one, reference, rtol=of, atol=of * 4 * max(size, 1))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mean", [1e4, -1e5])
def test_a_large_mean_costs_no_precision(mean):
    x = (tensor((1, 2, 30, 40), torch.float64, 0) + mean).float()
    of_mean, of_var = triton_rows.moments([x])
    torch.testing.assert_close(of_mean, x.double().mean((2, 3)).float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(of_var, x.double().var((2, 3), correction=0).float(), rtol=2e-5, atol=0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(value):
    x = tensor((2, 3, 9, 9), torch.float32, 0)
    x[1, 2, 4, 4] = value
    mean, var = triton_rows.moments([x])
    for found in (mean, var):
        assert not found[1, 2].isfinite() and found.isfinite().sum() == 5


@pytest.mark.parametrize("name", LAYERS)
def test_layers_made_of_them(name):
    """A training step, in lists for a layer of domains."""
    several = name == "DomainBatchNorm"
    make = (lambda: dn.DomainBatchNorm(16, 3, "shared", "per_domain")) if several else LAYERS[name]
    shapes = [(6, 16, 5, 7), (6, 16, 3, 4), (6, 16, 1, 1)] if several else [(6, 16, 5, 7)]
    found = []
    with mock.patch.object(by_batch, "takes_batches", lambda _: False), mock.patch.object(in_step, "suits_torch", no):
        for module in (triton_rows, plain):
            layer, xs = make(), [tensor(shape, torch.float32, k).requires_grad_() for k, shape in enumerate(shapes)]
            calls = mock.Mock(return_value=module)
            with mock.patch.object(moments, "kernel", calls):
                ys = layer(xs if several else xs[0])
                ys = list(ys) if several else [ys]
                torch.autograd.backward(ys, [tensor(y.shape, torch.float32, 9) for y in ys])
            assert calls.call_count >= 4  # moments, affine, sums, gradient
            found.append([*ys, *(x.grad for x in xs), *(p.grad for p in layer.parameters()), *layer.buffers()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def no(*_):
    return False


@pytest.mark.parametrize("dtype", gpu.TYPES)
def test_a_process_tries_them_before_it_uses_them(dtype):
    cpu = torch.device("cpu")
    for default in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            assert gpu.tried(cpu, dtype) is triton_rows
        finally:
            torch.set_default_dtype(torch.float32)
    wrong = mock.patch.object(triton_rows, "sums", lambda *args: [2 * v for v in plain.sums(*args)])
    with wrong, pytest.warns(UserWarning, match="without Triton's kernels, and is slower: AssertionError"):
        assert gpu.tried(cpu, dtype) is None
    full = mock.patch.object(triton_rows, "sums", mock.Mock(side_effect=torch.OutOfMemoryError))
    with full, pytest.raises(torch.OutOfMemoryError):
        gpu.tried(cpu, dtype)
