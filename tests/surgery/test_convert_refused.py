"""What the conversion of norm layers refuses, changing nothing, and choices that are not those of the old layer."""

import copy

import pytest
import torch
from torch import nn

import domainnorm as dn


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("last", "name", "options", "error", "message"),
    [
        (nn.BatchNorm2d(3), "Ghost", {}, ValueError, "'GhostBN'.*got 'Ghost'"),
        (nn.BatchNorm2d(3), "", {}, ValueError, "got ''"),
        (nn.BatchNorm2d(3), "GhostBN", {"samples_per_group": 0}, ValueError, "samples_per_group.*positive.*got 0"),
        (nn.BatchNorm2d(3), "GhostBN", {"size": 4}, TypeError, "size"),
        (nn.BatchNorm2d(3), "GBGN", {"sync": True}, ValueError, "sync"),
        (nn.LazyBatchNorm2d(), "BN", {}, ValueError, r"^1: a lazy BatchNorm .*run the model once"),
        (Doubled(3), "BN", {}, TypeError, r"^1: Doubled has a forward pass of its own"),
    ],
)
def test_refused_and_nothing_changed(last, name, options, error, message):
    model = nn.Sequential(nn.BatchNorm2d(8), last)
    children, before = list(model), copy.deepcopy(model[0].state_dict())
    with pytest.raises(error, match=message):
        dn.convert_batchnorm(model, name, **options)
    assert all(a is b for a, b in zip(model, children, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model[0].state_dict().items())


def test_frozen_batch_norm_does_not_train_its_affine():
    """As everywhere: unless `train_affine`."""
    for train in (False, True):
        model = dn.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(4)), "FrozenBN", train_affine=train)
        assert [p.requires_grad for p in model.parameters()] == [train] * 2


@pytest.mark.parametrize("convert", [lambda m, **o: dn.convert_batchnorm(m, "BN", **o), dn.convert_groupnorm])
def test_an_affine_can_be_left_out(convert):
    model = convert(nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4)), affine=None)
    assert sum(len(list(m.parameters())) for m in model if isinstance(m, dn.DomainBatchNorm)) == 0


@pytest.mark.parametrize(("name", "options"), [("BN", {"num_domains": 1}), ("GN", {"num_groups": 2})])
def test_several_domains_that_cannot_become_one_are_refused(name, options):
    model = nn.Sequential(nn.BatchNorm2d(4), dn.DomainBatchNorm(4, num_domains=3, affine="per_domain"))
    first = model[0]
    with pytest.raises(ValueError, match=r"^1: "):
        dn.convert_batchnorm(model, name, **options)
    assert model[0] is first


def test_unknown_options_are_refused_also_for_group_norm():
    with pytest.raises((TypeError, ValueError), match="groups"):
        dn.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(4)), "GN", groups=2)


def test_frozen_statistics_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="running statistics"):
        dn.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)), "FrozenBN")


def test_buffers_keep_a_dtype_of_their_own():
    """Half-precision weights with statistics of float32, as torch's layers may have."""
    layer = nn.BatchNorm2d(4).bfloat16()
    layer.running_mean, layer.running_var = torch.full((4,), 1 / 3), torch.full((4,), 2 / 3)
    new = dn.convert_batchnorm(nn.Sequential(layer), "GhostBN")[0]
    assert new.weight.dtype == torch.bfloat16 and torch.equal(new.running_mean, layer.running_mean)
