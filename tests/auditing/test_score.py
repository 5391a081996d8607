"""Remedies applied one by one, and scored; arguments that cannot be."""

import copy
import math

import pytest
import torch
from ranks import run_ranks
from torch import nn

import domainnorm as dn


class SharedHead(nn.Module):
    """One head on two inputs that are far from each other."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.out = norm, nn.Conv2d(4, 1, 1)

    def forward(self, x):
        return torch.cat([self.out(self.norm(level)).mean((2, 3)) for level in (x, 5 * x + 9)], 1)


def images(number=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 4, 6, 6, generator=generator) for _ in range(number)]


@torch.no_grad()
def trained(model, steps=80):
    torch.manual_seed(0)
    for _ in range(steps):
        model.train()(torch.randn(16, 4, 6, 6))
    return model.eval()


@torch.no_grad()
def closeness(model):
    """To what training predicts: the second input is normalized to the first."""
    y = model(torch.cat(images(4, seed=9)))
    return -float((y[:, 0] - y[:, 1]).abs().mean())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, dn.DomainBatchNorm])
def test_own_statistics_of_each_call_repair_a_shared_head(norm):
    model = trained(SharedHead(norm(4)))
    state, contents = copy.deepcopy(model.state_dict()), dict(vars(model.norm))
    random = torch.get_rng_state()
    report = dn.audit(model, images(), score=closeness, progress=False)
    assert report.findings[0].check == "calls"
    broken, repaired = report.scores[:2]
    assert broken == {"what": "as it is", "score": closeness(model)}
    assert repaired["what"] == "calls: own statistics for each call of norm"
    assert broken["score"] < -0.5 and repaired["score"] > -0.01
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert vars(model.norm) == contents and not model._forward_pre_hooks and torch.equal(torch.get_rng_state(), random)


def test_calls_are_counted_in_each_forward_pass_of_the_score():
    """In batches of any size, after a call of a part of the model alone, and image by image."""
    model = trained(SharedHead(nn.BatchNorm2d(4)))

    def other(model):
        model.norm(torch.randn(2, 4, 3, 3))
        y = torch.cat([model(x[None]) for x in torch.cat(images(4, seed=9))])
        return -float((y[:, 0] - y[:, 1]).abs().mean())

    scores = dn.audit(model, images(), score=other, progress=False).scores
    assert scores[1]["score"] == pytest.approx(
        dn.audit(model, images(), score=closeness, progress=False).scores[1]["score"], abs=1e-5
    )


def test_domains_get_statistics_of_their_own():
    class Head(SharedHead):
        def forward(self, x):
            return torch.cat([self.out(y).mean((2, 3)) for y in self.norm([x, 5 * x + 9])], 1)

    model = trained(Head(dn.DomainBatchNorm(4, num_domains=2, population_statistics="shared")))
    state = copy.deepcopy(model.state_dict())
    scores = dn.audit(model, images(), score=closeness, progress=False).scores
    assert scores[0]["score"] < -0.5 and scores[1]["score"] > -0.01
    assert model.norm.running_mean.shape == (4,) and model.norm.population_statistics == "shared"
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_recomputed_statistics_one_finding_after_the_other():
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten()))
    right = dn.recompute_population_statistics(copy.deepcopy(model), images(), progress=False).eval()
    model[0].running_mean += 3
    model[2].reset_running_stats()
    model[2].weight.data *= 2
    right[2].weight.data *= 2
    expected = right(images()[0]).detach()

    def score(model):
        return -(model(images()[0]) - expected).square().mean()  # a tensor will do

    report = dn.audit(model, images(), score=score, progress=False)
    kinds = [finding.kind for finding in report.findings]
    assert "never updated" in kinds and "statistics lag" in kinds
    scores = {row["what"]: row["score"] for row in report.scores}
    assert next(iter(scores)) == "as it is" and list(scores)[-1] == "all together" and len(scores) == 4
    assert scores["drift: statistics of 0 recomputed"] > scores["as it is"]
    assert scores["frozen: statistics of 2 recomputed"] != scores["as it is"]
    assert -1e-6 < scores["all together"] <= 0


def test_minibatch_statistics_where_there_is_nothing_else():
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)))
    report = dn.audit(model, images(), score=lambda model: 1.0, progress=False)
    assert report.healthy and report.scores == [{"what": "as it is", "score": 1.0}]
    shifted = [x + 3 for x in images()]

    def score(model):
        return -model(shifted[0]).var()

    report = dn.audit(model, shifted, score=score, checks=["consistency"], progress=False)
    assert [row["what"] for row in report.scores] == ["as it is", "consistency: 0 by minibatch statistics"]
    assert report.scores[0]["score"] != report.scores[1]["score"]


def _on_ranks(rank):
    from domainnorm.distributed import gather_objects

    def score(model):
        return sum(gather_objects(closeness(model)))

    model = trained(SharedHead(nn.BatchNorm2d(4)))
    if rank:
        model.norm.running_var *= 30  # here it is another finding that is the worst
    return dn.audit(model, images(), score=score, progress=False).scores


def test_ranks_score_the_same_remedies():
    one, other = run_ranks(_on_ranks, 2)
    assert one == other and "calls: own statistics for each call of norm" in [row["what"] for row in one]


@pytest.mark.parametrize("fails_at", [0, 1])
def test_an_error_of_the_score_changes_nothing(fails_at):
    model = trained(SharedHead(nn.BatchNorm2d(4)))
    state, calls = copy.deepcopy(model.state_dict()), []

    def score(model):
        calls.append(1)
        model(images()[0])
        model.norm.running_mean += 1
        if len(calls) > fails_at:
            raise KeyError("own")
        return 0

    with pytest.raises(KeyError, match="own"):
        dn.audit(model.train(), images(), score=score, progress=False)
    assert model.training and not model._forward_pre_hooks and not model.norm._forward_pre_hooks
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("value", "got"),
    [(math.nan, "nan"), (math.inf, "inf"), (None, "NoneType"), (True, "True"), (torch.ones(2), "Tensor")],
)
def test_a_score_is_a_finite_number(value, got):
    model = trained(SharedHead(nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match=rf"score\(model\), as it is: expected a finite number, .* got {got}$"):
        dn.audit(model, images(), score=lambda model: value, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checks": ["drift", "speed"]}, r"checks takes any of \['calls', .*\], got 'speed'"),
        ({"checks": "speed"}, "got 'speed'"),
        ({"accumulate": 0}, "accumulate takes the number of batches in a step, 1 or more, got 0"),
        ({"accumulate": 2.0}, "1 or more, got 2.0"),
        ({"batches": torch.zeros(4, 4, 6, 6)}, r"got one Tensor: give \[batch\] if it is one"),
        ({"batches": {"x": torch.zeros(4, 4, 6, 6)}}, r"got one Tensor for 'x': give \[batch\]"),
        ({"batches": 3}, "got one int"),
        ({"batches": []}, "there is no batch"),
        ({"thresholds": {"drfit": 1.0}}, "got 'drfit'"),
    ],
)
def test_arguments(options, message):
    model = SharedHead(nn.BatchNorm2d(4))
    given = {"batches": images(), **options}
    with pytest.raises(ValueError, match=message) as caught:
        dn.audit(model, given.pop("batches"), progress=False, **given)
    assert "\n" not in str(caught.value)
