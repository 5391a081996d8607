"""Drift from exact statistics, of all batches as if they were one."""

import copy

import pytest
import torch
from torch import nn

import domainnorm as dn
from domainnorm.auditing.exact import exact_moments
from domainnorm.auditing.norms import find_norms
from domainnorm.auditing.run import Passes
from domainnorm.auditing.seen import Seen, Thresholds


class Pyramid(nn.Module):
    """One head on three sizes of what comes in."""

    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.ModuleList([nn.Conv2d(6, 6, 1), norm, nn.Conv2d(6, 2, 1)])

    def forward(self, x):
        x, found = self.stem(x), []
        for k in range(3):
            y = 3.0**k * nn.functional.avg_pool2d(x, 2**k)
            for layer in self.head:
                y = layer(y)
            found.append(y.mean((2, 3)))
        return sum(found)


def images(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 8, 8, generator=generator).double() + k for k, n in enumerate(sizes)]


def call(model, x):
    return model(x)


def measured(model, batches, loss=None, forward=call):
    model.eval()
    seen = Seen(model, find_norms(model), Thresholds())
    passes = Passes(model, seen, forward, loss, progress=False)
    with torch.no_grad(), passes.observer.attached():
        passes.measure(batches)
    with torch.no_grad():
        return exact_moments(passes, {"": batches}), seen


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, dn.DomainBatchNorm, dn.BatchRenorm])
def test_they_are_those_of_one_big_batch(norm):
    torch.manual_seed(0)
    model, batches = Pyramid(norm(6)).double(), images((3, 5, 2))
    before = copy.deepcopy(model.state_dict())
    found, _ = measured(model, batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    _, seen = measured(model, [torch.cat(batches)])
    assert set(found) == set(seen.own) == {(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0)}
    for site, own in seen.own.items():
        torch.testing.assert_close(found[site].mean, own.own.mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[site].var, own.own.var, rtol=1e-10, atol=1e-10)
        assert torch.equal(found[site].count, own.own.count)


def test_they_are_the_recomputed_ones():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    model, batches = nn.Sequential(*layers).double(), images((4, 3))
    found, _ = measured(model, batches)
    dn.recompute_population_statistics(model, batches, method="exact", progress=False)
    for k, layer in enumerate((model[1], model[4])):
        torch.testing.assert_close(found[k, 0, 0].mean[0], layer.running_mean)
        torch.testing.assert_close(found[k, 0, 0].unbiased_var()[0], layer.running_var)


def test_domains_and_training_mode():
    layer, ran = dn.DomainBatchNorm(3, num_domains=2).double(), []
    batches = [(torch.randn(n, 3, 4, 4).double(), torch.arange(n) % 2) for n in (5, 4)]

    def loss(model, batch):
        ran.append(model.training)
        return model[0](*batch).sum()

    model = nn.ModuleList([layer])
    found, _ = measured(model, batches, loss, lambda model, batch: model[0](*batch))
    assert ran == [True] * 4 and not model.training
    for domain in (0, 1):
        x = torch.cat([x[ids == domain] for x, ids in batches])
        torch.testing.assert_close(found[0, 0, domain].mean[0], x.mean((0, 2, 3)))
        torch.testing.assert_close(found[0, 0, domain].var[0], x.var((0, 2, 3), correction=0))


class OneByOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        return torch.cat([self.norm(image[None]) for image in images])


def test_images_one_by_one():
    batches = images((3, 3))
    found, _ = measured(OneByOne().double(), batches)
    assert list(found) == [(0, 0, 0)]
    torch.testing.assert_close(found[0, 0, 0].mean[0], torch.cat(batches).mean((0, 2, 3)))


def test_exact_statistics_have_no_drift_where_pooled_ones_do():
    """Batches that differ: each layer after the first sees others, normalized by themselves, than exact ones are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    batches = [4 * k + torch.randn(32, 3, 8, 8) for k in range(6)]
    dn.recompute_population_statistics(model, batches, method="exact", progress=False)
    drift = {}
    for exact in (False, True):
        report = dn.audit(model.eval(), iter(batches), exact=exact, checks="drift", progress=False)
        drift[exact] = [(finding.layers, finding.message) for finding in report.findings]
    assert drift[False][0][0] == ["4"] and drift[True] == []
    model[4].running_mean.add_(model[4].running_var.sqrt())
    report = dn.audit(model, batches, exact=True, checks="drift", progress=False)
    (finding,) = report.findings
    assert finding.layers == ["4"] and "the exact statistics" in finding.message
    assert 0.3 < finding.value <= 0.5  # half a squared standard deviation, less what sampling explains


def test_few_samples_are_no_drift():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with torch.no_grad():
        for _ in range(60):
            model.train()(torch.randn(64, 3, 8, 8) + torch.randn(64, 3, 1, 1))
    few = [torch.randn(2, 3, 8, 8) + torch.randn(2, 3, 1, 1) for _ in range(2)]
    assert not dn.audit(model.eval(), few, exact=True, checks="drift", progress=False).findings
