"""Batches whose samples are exchanged, and what of it is a finding."""

import copy
import itertools
from functools import partial

import pytest
import torch
from ranks import run_ranks
from torch import nn

import domainnorm as dn
from domainnorm.auditing.leak import Leak, _is_significant
from domainnorm.auditing.mixing import Mixing
from domainnorm.auditing.norms import find_norms
from domainnorm.auditing.outputs import confidence

CLASSES = 8
audit = partial(dn.audit, progress=False, leak=True)


def bags(number, seed, classes=None, rows=32):
    """Rows of so many classes (None: any), a third of which show what they are, and their labels."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(number):
        y = torch.randint(CLASSES, (rows,), generator=generator)
        if classes is not None:
            y = torch.randperm(CLASSES, generator=generator)[:classes].repeat_interleave(rows // classes)
        x = 2 * nn.functional.one_hot(y, CLASSES) + 0.3 * torch.randn(rows, CLASSES, generator=generator)
        found.append((x * (torch.rand(rows, 1, generator=generator) < 0.3), y))
    return found


def network():
    layers = [nn.Linear(CLASSES, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, CLASSES))


def trained(batches, model=None, forward=lambda model, x: model(x)):
    torch.manual_seed(0)
    model = model or network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(forward(model, x), y).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def of_one_class():
    return trained(bags(600, 1, classes=1))


@pytest.fixture(scope="module")
def of_any_class():
    return trained(bags(600, 1))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def first(model, batch):
    return model(batch[0])


def only_if_any(model, batch):
    return model[0](batch) if len(batch) else batch


def of_leak(report):
    return [finding for finding in report.findings if finding.check == "leak"]


@pytest.mark.parametrize("with_loss", [True, False])
def test_a_model_that_reads_its_batch_is_named(of_one_class, with_loss):
    report = audit(of_one_class, bags(16, 7, classes=1), forward=first, loss=loss if with_loss else None)
    (finding,) = of_leak(report)
    assert (finding.kind, finding.level, finding.layers[0]) == ("uses batch mates", "error", "1")
    assert report.findings[0] is finding
    unit = "loss" if with_loss else "confidence"
    given, mixed = report.leak[f"{unit}_given"], report.leak[f"{unit}_mixed"]
    assert given < 0.5 < 1.5 < mixed if with_loss else given > 0.7 > 0.5 > mixed
    assert finding.value == pytest.approx(abs(given - mixed) / max(given, mixed))
    assert finding.unit == f"of the {unit}" and f"{unit} is {given:.3g}, and {mixed:.3g}" in finding.message
    assert report.leak["change_given"] > 1.2 * report.leak["change_mixed"]
    assert "\n" not in finding.message and "GhostBatchNorm" in finding.remedy


def test_its_twin_of_mixed_batches_is_not(of_any_class):
    for seed in range(8):
        report = audit(of_any_class, bags(16, 7 + seed), forward=first, loss=loss)
        assert not of_leak(report)
        assert report.leak["change_given"] == pytest.approx(report.leak["change_mixed"], rel=0.4)
        assert abs(report.leak["effect"]) < 0.08


def test_a_model_is_judged_by_what_it_does(of_one_class, of_any_class):
    """Not by the batches: one that leaks cannot in mixed batches, one that does not is worse in others."""
    assert not of_leak(audit(of_one_class, bags(16, 7), forward=first, loss=loss))
    (finding,) = of_leak(audit(of_any_class, bags(16, 7, classes=1), forward=first, loss=loss))
    assert (finding.kind, finding.level) == ("batches are not mixed", "warning")
    assert finding.details["loss_given"] > 1.3 * finding.details["loss_mixed"]


def test_minibatches_of_two_classes():
    model = trained(bags(600, 1, classes=2))
    (finding,) = of_leak(audit(model, bags(16, 7, classes=2), forward=first, loss=loss))
    assert finding.kind == "uses batch mates" and finding.value > 0.15


class Head(nn.Module):
    """Images `(3, H, W)` into one normalization, then some rows of each image into a head."""

    def __init__(self, head):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(CLASSES), head

    def forward(self, images):
        features = [self.norm(image[None]) for image in images]
        rows = torch.cat([image.flatten(1).T for image in images])
        sizes = [image[0].numel() for image in images]
        logits = self.head(rows).split(sizes)
        scores = [x.softmax(1).amax(1) for x in logits]
        return [{"scores": s, "boxes": s, "features": y} for s, y in zip(scores, features, strict=True)]


def test_regions_of_one_image(of_one_class, of_any_class):
    """One image a batch: rows of the head are exchanged; within `RoIShuffle` they are in training anyway."""
    images = [[x.T.reshape(CLASSES, 4, -1)] for x, _ in bags(16, 7, classes=1)]
    images[3] = [images[3][0][:, :, :5]]
    (finding,) = of_leak(audit(Head(of_one_class), images))
    assert finding.kind == "uses batch mates" and finding.layers[:1] == ["head.1"] and "RoIShuffle" in finding.remedy
    assert not of_leak(audit(Head(dn.RoIShuffle(of_any_class)), images))
    assert not of_leak(audit(Head(of_any_class), [[x.T.reshape(CLASSES, 4, -1)] for x, _ in bags(16, 7)]))


def mixed(model, batches, seed, forward=lambda model, x: model(x)):
    """What each batch gives, and the mixing that did it."""
    mixing = Mixing(model.eval(), find_norms(model))
    with torch.no_grad(), mixing.attached():
        return mixing.run([partial(forward, model, batch) for batch in batches], seed), mixing


def in_training(model, batches):
    model = copy.deepcopy(model).train()
    return [model(batch) for batch in batches]


def equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_as_given_it_is_training():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))
    images = [torch.randn(n, 2, 9, 9 + n).double() for n in (3, 1, 5)]
    for model in (plain, dn.convert_batchnorm(copy.deepcopy(plain), "GhostBatchNorm", samples_per_group=2)):
        model.double()
        model[1].running_mean.normal_()
        if model is not plain:
            for layer in (model[1], model[4]):
                layer.sample_groups.allow_smaller_batch = True
        expected = in_training(model, images)
        equal(mixed(model, images, None)[0], expected)
    for sgd in ("shared", "per_domain"):
        layer = dn.DomainBatchNorm(2, num_domains=2, sgd_statistics=sgd, population_statistics="per_domain").double()
        levels = [[torch.randn(n, 2, 4, 4).double(), torch.randn(n, 2, 2, 2).double()] for n in (3, 2)]
        expected = in_training(layer, levels)
        equal(*(itertools.chain.from_iterable(each) for each in (mixed(layer, levels, None)[0], expected)))


def test_mixed_it_is_training_on_exchanged_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 5), nn.BatchNorm1d(5)).double()
    batches = [torch.randn(n, 3).double() for n in (4, 7, 2)]
    outputs, mixing = mixed(copy.deepcopy(model), batches, 5)
    (places,) = mixing._places.values()
    assert sorted(places.tolist()) == list(range(13)) and places.tolist() != list(range(13))
    exchanged = torch.empty(13, 3).double()
    exchanged[places] = torch.cat(batches)
    equal([torch.cat(outputs)], [torch.cat(in_training(model, exchanged.split([4, 7, 2])))[places]])


def test_domains_stay_apart():
    layer = dn.DomainBatchNorm(2, num_domains=2).double()
    ids = [torch.tensor([0, 1, 1]), torch.tensor([1, 0, 0, 0])]
    x = [torch.randn(len(k), 2, 3).double() + 100 * k[:, None, None] for k in ids]
    outputs, _ = mixed(layer, list(zip(x, ids, strict=True)), 3, lambda layer, batch: layer(*batch))
    assert torch.cat(outputs).abs().max() < 5  # 10 where those of two domains are normalized together


def test_the_model_and_random_numbers_are_left_alone(of_one_class):
    model = nn.Sequential(copy.deepcopy(of_one_class), nn.Dropout(0.5)).train()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    batches = bags(6, 7)
    report = audit(model, iter(batches), forward=first, loss=loss)
    assert report.passes == 3 + 6 and report.leak["batches"] == 6
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and not model[0][1]._forward_pre_hooks


def test_few_batches_show_nothing(of_one_class):
    report = audit(of_one_class, bags(2, 7, classes=1), forward=first, loss=loss)
    assert report.leak["effect"] > 0.3 and not report.leak["significant"] and not of_leak(report)


def test_what_cannot_be_mixed(of_any_class):
    with pytest.raises(ValueError, match="expected two batches or more, got one"):
        audit(of_any_class, bags(1, 7), forward=first)
    with pytest.raises(dn.UserError, match=r"in one order: forward 0 is .*, forward 1 .*"):
        audit(nn.ModuleList([nn.BatchNorm1d(3)]), [torch.randn(4, 3), torch.zeros(0)], forward=only_if_any)
    assert dn.audit(of_any_class, bags(2, 7), forward=first, progress=False).leak is None
    no_norm = audit(nn.Sequential(nn.Linear(3, 2)), [torch.randn(4, 3)] * 2)
    assert no_norm.leak["effect"] != no_norm.leak["effect"] and not no_norm.findings


def _on_ranks(rank):
    torch.manual_seed(0)
    report = audit(network(), bags(4 + rank, rank, classes=1), forward=first, loss=loss)
    with pytest.raises(dn.UserError, match="two batches or more"):
        audit(network(), bags(1 + rank, 0), forward=first)
    return report.leak


def test_each_rank_knows_the_batches_of_all():
    one, other = run_ranks(_on_ranks, 2)
    assert one == other and one["batches"] == 9
    torch.manual_seed(0)
    alone = audit(network(), bags(4, 0, classes=1), forward=first, loss=loss).leak
    torch.manual_seed(0)
    last = audit(network(), bags(5, 1, classes=1), forward=first, loss=loss).leak
    assert one["loss_given"] == pytest.approx((4 * alone["loss_given"] + 5 * last["loss_given"]) / 9)
    assert one["loss_mixed"] == pytest.approx((4 * alone["loss_mixed"] + 5 * last["loss_mixed"]) / 9)


def test_chance_is_rarely_significant():
    generator = torch.Generator().manual_seed(0)
    for number, most in ((3, 0.02), (5, 0.006), (20, 0.006)):
        found = [_is_significant(torch.randn(number, generator=generator), 0.0) for _ in range(4000)]
        assert sum(found) / 4000 < most
    assert not _is_significant(torch.tensor([1.0, 1.1]), 0.0)


def test_the_effect_is_a_share():
    leak = Leak(losses=[(0.5, 2.1, 1.9)] * 4 + [(float("nan"), 1.0, 1.0)])
    assert leak.effect() == (pytest.approx(0.75), True)
    leak = Leak(confidences=[(0.9, 0.62, 0.58)] * 4, changes=[(0.09, 0.09, 0.04)] * 4)
    assert leak.effect() == (pytest.approx(1 / 3), True)
    assert leak.change() == (pytest.approx(0.3), pytest.approx(0.2), True)
    assert Leak(confidences=[(float("nan"),) * 3] * 4).effect()[1] is False


def test_how_sure_a_model_is():
    logits = torch.tensor([[0.0, 0.0], [0.0, 50.0]])
    assert confidence(logits) == confidence({"out": logits}) == confidence((logits, "x")) == pytest.approx(0.75)
    assert confidence(torch.tensor([[0.0], [-50.0]])) == pytest.approx(0.75)
    images = [{"boxes": torch.zeros(2, 4), "scores": torch.tensor([0.5, 0.7])}, {"boxes": [], "scores": torch.zeros(0)}]
    assert confidence(images) == pytest.approx(0.6)
    for unknown in (None, [], torch.tensor([1, 2]), "abc", {"text": "abc"}):
        assert confidence(unknown) != confidence(unknown)
