"""What users do with an audit: models that change their input, rare events, other random numbers, wrong arguments."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import domainnorm as dn
from domainnorm.errors import UserError


def audit(model, batches, **options):
    return dn.audit(model, batches, progress=False, **options)


def images(number=4, size=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(number)]


def trained(model, batches=None):
    with torch.no_grad():
        for x in batches or images(80):
            model.train()(x.clone())
    return model


class ChangesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, batch):
        x = batch.pop("image") if isinstance(batch, dict) else batch
        np.random.rand()
        random.random()
        return self.norm(x.mul_(2).sub_(1))


def test_each_pass_gets_the_batch_as_it_was_given():
    model, batches = trained(ChangesItsInput()), images()
    before = [x.clone() for x in batches]
    states = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    assert audit(model, batches).findings == []
    assert all(torch.equal(x, y) for x, y in zip(batches, before, strict=True))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2])
    dicts = [{"image": x} for x in batches]
    assert audit(model, dicts).findings == [] and all(list(batch) == ["image"] for batch in dicts)


@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("probability", [0.02, 0.005])
def test_rare_events_are_no_dead_channels(probability, batch):
    """Most channels do not vary in so few samples; their statistics are right."""
    norm = nn.BatchNorm1d(64)
    norm.running_mean.fill_(probability)
    norm.running_var.fill_(probability * (1 - probability))
    batches = [(torch.rand(batch, 64) < probability).float() for _ in range(8)]
    assert audit(nn.Sequential(norm).eval(), batches).findings == []


def test_an_empty_batch_of_this_librarys_layers():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), dn.DomainBatchNorm(8)))
    report = audit(model, [torch.zeros(0, 3, 8, 8), *images()])
    assert [(f.kind, f.value) for f in report.findings] == [("empty batch", 1.0)]


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_infinite_statistics_come_first(name):
    model = trained(nn.Sequential(nn.BatchNorm2d(3)))
    getattr(model[0], name)[1] = float("inf")
    report = audit(model, [x + 2 for x in images()])  # they are wrong, too
    assert report.findings[0].kind == "broken statistics"
    assert str(report) and "null" in report.to_json()
    pytest.importorskip("matplotlib")
    assert "broken statistics" in report.to_html()


class ThreeDomains(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = dn.DomainBatchNorm(3, num_domains=3)

    def forward(self, x):
        return self.norm([x, 3 * x + 1, x - 4])


def test_statistics_of_a_known_domain_that_lag():
    model = trained(ThreeDomains())
    assert audit(model, images()).findings == []
    model.norm.running_mean[2] += 2
    finding = audit(model, images()).findings[0]
    assert (finding.check, finding.level, finding.layers) == ("drift", "error", ["norm"])
    dn.recompute_population_statistics(model, images(), progress=False)
    assert audit(model, images()).findings == []
    # as far, and nearer to the statistics of another level: still not a new domain, as every image has all levels
    model.norm.running_mean[0] -= 10
    finding = audit(model, images()).findings[0]
    assert (finding.check, finding.kind) == ("drift", "statistics lag")


def test_what_is_like_none_of_the_domains_it_may_be_of():
    model = trained(ThreeDomains())
    day, new = [(3 * x + 1, 1) for x in images()], [(x + 8, 0) for x in images()]
    report = audit(model, {"day": day, "new": new}, forward=of_domain)
    assert "far from all" in [finding.kind for finding in report.findings]


def of_domain(model, batch):
    x, domain = batch
    return model.norm(x, domain=domain)


def test_eight_images_are_a_batch():
    """Of features of one pixel, as the last ones of a classifier of small images are."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(16))
    trained(model, images(80, 8))
    assert audit(model, images(8, 8)).findings == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": 3}, "thresholds takes numbers by their names"),
        ({"thresholds": {"drift": float("inf")}}, "drift takes a positive number, got inf"),
        ({"thresholds": {"drfit": 1}}, "got 'drfit'"),
        ({"checks": 3}, "checks takes names of"),
        ({"checks": ["lek"]}, "got 'lek'"),
        ({"score": 3}, "score takes a function, got 3"),
        ({"loss": "x"}, "loss takes a function, got 'x'"),
        ({"optimizer": 3}, "optimizer takes an optimizer of torch, got 3"),
        ({"accumulate": 0}, "accumulate takes"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(UserError, match=message):
        audit(trained(nn.Sequential(nn.BatchNorm2d(3))), images(), **options)
    with pytest.raises(UserError, match=r"model takes an nn\.Module, got 'resnet'"):
        audit("resnet", images())


def test_batches_of_inputs_and_targets():
    with pytest.raises(TypeError) as error:
        audit(nn.Sequential(nn.Conv2d(3, 4, 1)), [(images()[0], torch.zeros(16))])
    notes = getattr(error.value, "__notes__", ["give forward=lambda"])  # from Python 3.11 on
    assert "give forward=lambda" in notes[0]
