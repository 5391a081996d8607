"""A thousand domains with ids cost what their samples cost: nothing is as large as samples times domains."""

import resource

import pytest
import torch
from ranks import run_ranks

import domainnorm as dn
from domainnorm.ops.moments import Moments

K, N, C = 1000, 1500, 64
LAYERS = {
    "per_domain": lambda: dn.DomainBatchNorm(C, num_domains=K, affine="per_domain"),
    "shared": lambda: dn.DomainBatchNorm(C, num_domains=K, sgd_statistics="shared"),
    "ghost": lambda: dn.GhostBatchNorm(C, num_domains=K, samples_per_group=2, allow_smaller_batch=True),
    "ghost_num": lambda: dn.GhostBatchNorm(C, num_domains=K, num_sample_groups=3, allow_smaller_batch=True),
    "seq": lambda: dn.SeqNorm(
        C, num_domains=K, num_channel_groups=2, num_sample_groups=2, allow_smaller_batch=True, affine="per_domain"
    ),
    "gbgn": lambda: dn.GroupedBatchNorm(
        C, num_domains=K, num_channel_groups=2, samples_per_group=2, allow_smaller_batch=True
    ),
    "renorm": lambda: dn.BatchRenorm(C, num_domains=K),
    "bgn": lambda: dn.BatchGroupNorm(C, num_domains=K, num_groups=16),
}


def _peak(_, name):
    torch.set_num_threads(1)
    layer = LAYERS[name]()
    x, ids = torch.randn(N, C, 4, requires_grad=True), torch.arange(N) * 7 % K
    layer(x[:2], ids[:2]).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for training in (True, False):
        layer.train(training)(x, ids).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_memory(name):
    assert run_ranks(_peak, 1, name)[0] < 60  # MB; the input has 1.5, and samples times domains times channels 384


@pytest.mark.parametrize("name", LAYERS)
def test_the_result_is_that_of_fewer_domains(name):
    """Those that have samples are normalized as if there were no others."""
    many, ids = LAYERS[name]().double(), torch.tensor([3, 998, 3, 500, 998, 3, 3, 500])
    x = torch.randn(8, C, 4, dtype=torch.float64, requires_grad=True)
    y = many(x, ids)
    for domain in (3, 500, 998):
        if name == "shared":
            continue
        own = LAYERS[name]().double()(x[ids == domain].detach(), domain)
        torch.testing.assert_close(y[ids == domain], own)
    x.grad = None
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_merging_by_ids_is_exact_at_large_means():
    """Adding one by one would lose digits that a tree of sums does not."""
    generator = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(20_000, 4, 6, generator=generator, dtype=torch.float64)
    ids = torch.randint(3, (20_000,), generator=generator)
    found = Moments.rows(x.float()).merge_by(ids, 5)
    for k in range(3):
        own = x.float().double()[ids == k]
        assert found.count[k].item() == own[:, 0].numel()
        torch.testing.assert_close(found.mean[k].double(), own.mean((0, 2)), rtol=2e-7, atol=0)
        torch.testing.assert_close(found.var[k].double(), own.var((0, 2), correction=0), rtol=1e-5, atol=0)
    assert not found.count[3:].any() and not found.mean[3:].any() and not found.var[3:].any()


def test_nan_stays_in_its_set():
    mean = torch.zeros(4, 2)
    mean[1] = torch.nan
    merged = Moments(torch.ones(4, 1), mean, torch.ones(4, 2)).merge_by(torch.tensor([0, 1, 0, 2]), 3)
    assert merged.mean[1].isnan().all() and torch.isfinite(merged.mean[[0, 2]]).all()
