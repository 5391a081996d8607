import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domainnorm.ops.moments import Moments


def moments_of(x):
    """(count, ) mean and biased variance of the elements along dimension 0, as one set per column."""
    n = x.shape[0]
    mean = x.mean(0) if n else torch.zeros(x.shape[1:], dtype=x.dtype)
    var = x.var(0, correction=0) if n else torch.zeros_like(mean)
    return Moments(torch.full((1, 1), float(n), dtype=x.dtype), mean[None], var[None])


def assert_same(a, b, atol=1e-10):
    torch.testing.assert_close(a.count.expand_as(a.mean), b.count.expand_as(b.mean), atol=0, rtol=0)
    torch.testing.assert_close(a.mean, b.mean, atol=atol, rtol=0)
    torch.testing.assert_close(a.var, b.var, atol=atol, rtol=0)


@given(shape=st.lists(st.integers(0, 5), min_size=0, max_size=3), n=st.integers(0, 4), c=st.integers(1, 4))
@settings(deadline=None, max_examples=80)
def test_rows_are_the_moments_of_each_sample_and_channel(shape, n, c):
    x = torch.randn(n, c, *shape, dtype=torch.float64) * 3 + 1
    rows = Moments.rows(x)
    assert rows.mean.shape == rows.var.shape == (n, c) and rows.count.shape == (n, 1)
    for i in range(n):
        for j in range(c):
            row = x[i, j].flatten()
            expected = (row.mean(), row.var(correction=0)) if row.numel() else (torch.tensor(0.0), torch.tensor(0.0))
            assert rows.count[i, 0] == row.numel()
            torch.testing.assert_close(rows.mean[i, j], expected[0].double(), atol=1e-12, rtol=1e-12)
            torch.testing.assert_close(rows.var[i, j], expected[1].double(), atol=1e-12, rtol=1e-12)


@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_merge_is_the_moments_of_the_union_however_it_is_split(sizes, seed):
    x = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 + 5
    parts = [moments_of(part) for part in x.split(sizes)]
    whole = moments_of(x)
    assert_same(Moments.cat(parts).merge(0), whole)
    left, right = parts[0], parts[-1]
    for part in parts[1:]:
        left = left + part
    for part in reversed(parts[:-1]):
        right = part + right
    assert_same(left, whole)
    assert_same(right, whole)


def test_count_zero_is_the_identity():
    some, empty = moments_of(torch.randn(5, 3, dtype=torch.float64)), moments_of(torch.zeros(0, 3, dtype=torch.float64))
    for merged in (some + empty, empty + some):
        assert torch.equal(merged.mean, some.mean) and torch.equal(merged.var, some.var)


@given(groups=st.lists(st.integers(0, 3), min_size=0, max_size=9))
@settings(deadline=None, max_examples=40)
def test_merge_by_equals_merging_the_members_of_each_group(groups):
    rows = Moments.rows(torch.randn(len(groups), 2, 6, dtype=torch.float64))
    merged = rows.merge_by(torch.tensor(groups, dtype=torch.long), 4)
    assert merged.mean.shape == (4, 2)
    for g in range(4):
        members = torch.tensor([i for i, group in enumerate(groups) if group == g], dtype=torch.long)
        assert_same(merged[g : g + 1], rows[members].merge(0), atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
# float32 means have a spacing of mean / 1e7
@pytest.mark.parametrize(("mean", "error"), [(1e3, 1e-5), (1e4, 1e-4), (1e6 + 3, 5e-2)])
def test_large_means_cost_no_precision_in_float32(mean, error, memory_format):
    x = (torch.randn(8, 4, 60, 60, dtype=torch.float64) + mean).float().contiguous(memory_format=memory_format)
    exact = x.double().transpose(0, 1).flatten(1).var(1, correction=0)
    merged = Moments.rows(x).merge(0)
    assert merged.var.dtype == torch.float32
    assert ((merged.var[0].double() - exact) / exact).abs().max() < error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_half_types_are_float32(dtype):
    x = (torch.randn(2, 3, 40, 40) + 20).to(dtype)
    rows = Moments.rows(x)
    assert rows.mean.dtype == rows.var.dtype == rows.count.dtype == torch.float32
    torch.testing.assert_close(rows.var, x.float().var((2, 3), correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4), (2, 2, 3, 2), (0, 2, 3), (2, 2, 0)])
def test_gradients(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: (Moments.rows(x).mean, Moments.rows(x).var), x)
    merged = torch.autograd.gradcheck(lambda x: tuple(vars(Moments.rows(x).merge(0)).values())[1:], x)
    assert merged


def test_double_backward():
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: tuple(vars(Moments.rows(x).merge(0)).values())[1:], x)
    (grad,) = torch.autograd.grad(Moments.rows(x).var.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad[0, 0, 0], x)
    torch.testing.assert_close(second[0, 0], torch.tensor([4 / 9, -2 / 9, -2 / 9], dtype=torch.float64))
