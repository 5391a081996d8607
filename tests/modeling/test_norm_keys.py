"""Keys that every norm has, norms of one sample, and process groups of synchronized ones."""

import pytest
import torch
from ranks import run_ranks
from test_retinanet import images_and_targets, tiny
from torch import nn

import domainnorm as dn
from domainnorm.data.classification_sets import minibatch_size
from domainnorm.engine.describe import describe_normalization
from domainnorm.layers import DomainBatchNorm, is_norm

EVERYWHERE = ("MODEL.BACKBONE.NORM", "MODEL.FPN.NORM", "MODEL.RETINANET.NORM")


def everywhere(norm, *others):
    words = [word for key in EVERYWHERE for word in (key, norm)]
    return tiny(*words, "MODEL.NORM.BGN.SPLIT_SPACE", False, *others)


def norms(model):
    return [module for module in model.modules() if is_norm(module)]


@pytest.mark.parametrize("norm", ["BN", "GhostBN", "SeqNorm", "BGN", "GBGN", "BRN"])
def test_eps_and_momentum_of_every_norm(norm):
    model = everywhere(norm, "MODEL.NORM.EPS", 0.02, "MODEL.NORM.MOMENTUM", 0.3)
    assert {(layer.eps, layer.momentum) for layer in norms(model)} == {(0.02, 0.3)}
    own = {(layer.eps, layer.momentum) for layer in norms(everywhere(norm))}
    assert own == {(1e-5, 0.01 if norm == "BRN" else 0.1)}


@pytest.mark.parametrize("norm", ["GN", "IN", "PN"])
def test_eps_of_norms_of_a_sample(norm):
    assert {layer.eps for layer in norms(everywhere(norm, "MODEL.NORM.EPS", 0.02))} == {0.02}


def test_instance_norm_and_positional_norm():
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64) * 2 + 1
    instance = dn.get_norm("IN", 8, num_domains=3, sync=True, momentum=0.5).double()
    torch.testing.assert_close(instance(x), nn.InstanceNorm2d(8).double()(x))
    positional = dn.get_norm("PN", 8, num_domains=3).double()
    nn.init.normal_(positional.weight), nn.init.normal_(positional.bias)
    mean, var = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    weight, bias = (v.view(1, 8, 1, 1) for v in (positional.weight, positional.bias))
    torch.testing.assert_close(positional(x), (x - mean) / (var + 1e-5).sqrt() * weight + bias)
    assert list(positional.state_dict()) == ["weight", "bias"]
    assert not list(dn.get_norm("PN", 8, affine=None).parameters())


@pytest.mark.parametrize("norm", ["IN", "PN"])
def test_norms_of_a_sample_in_a_detector_and_a_model(norm):
    model = everywhere(norm).train()
    losses = model(*images_and_targets(size=(128, 128)))
    assert all(loss.isfinite() for loss in losses.values())
    model.eval()
    images = images_and_targets(size=(128, 128))[0]
    together, alone = model(images), [model([image])[0] for image in images]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one["scores"], other["scores"])
    assert "a sample alone" in describe_normalization(dn.load_config(), model) or norm == "PN"
    assert ("a place of a sample alone" in describe_normalization(dn.load_config(), model)) == (norm == "PN")
    body = nn.Sequential(nn.BatchNorm2d(8))
    converted = dn.convert_batchnorm(body, norm)
    assert is_norm(converted[0]) and not list(converted.buffers())


@pytest.mark.parametrize("norm", ["BN", "BRN", "GN"])
def test_fixed_weights(norm):
    model = everywhere(norm, "MODEL.NORM.FIXED_WEIGHT", True)
    for layer in norms(model):
        assert torch.equal(layer.weight, torch.ones_like(layer.weight))
        assert not layer.weight.requires_grad and layer.bias.requires_grad


def test_a_number_of_sample_groups():
    model = everywhere("GhostBN", "MODEL.NORM.GHOSTBN.NUM_SAMPLE_GROUPS", 2)
    assert {(layer.num_sample_groups, layer.samples_per_group) for layer in norms(model)} == {(2, None)}


def sub_groups(rank, size):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tiny("MODEL.RETINANET.NORM", "SyncBN", "MODEL.NORM.SYNC_GROUP_SIZE", size)
    layers = [m for m in model.head.modules() if isinstance(m, DomainBatchNorm)]
    assert len({id(layer.sync) for layer in layers}) == 1
    layer = layers[0].train()
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(rank))
    layer([x[:, :, : 4 - k // 2] for k in range(5)])
    return layer.running_mean.clone()


def test_synchronized_over_groups_of_processes():
    """Normalization batches between one process's and all of them (NBS of *Rethinking "Batch"*, §4.1)."""
    means = run_ranks(sub_groups, 4, 2)
    assert torch.equal(means[0], means[1]) and torch.equal(means[2], means[3])
    assert not torch.allclose(means[0], means[2])
    together = run_ranks(sub_groups, 2, 2)
    torch.testing.assert_close(together[0], means[0])


def test_minibatches_in_inference_are_those_of_the_groups():
    keys = ["MODEL.META_ARCHITECTURE", "Classifier", "MODEL.NORM.SYNC_GROUP_SIZE", 2, "SOLVER.IMS_PER_BATCH", 32]
    sizes = [minibatch_size(dn.load_config(None, [*keys, "MODEL.BACKBONE.NORM", norm]), 8) for norm in ("SyncBN", "BN")]
    assert sizes == [8, 4]


def test_one_process_builds_what_groups_of_processes_trained():
    model = tiny("MODEL.RETINANET.NORM", "SyncBN", "MODEL.NORM.SYNC_GROUP_SIZE", 2)
    assert {m.sync for m in model.head.modules() if isinstance(m, DomainBatchNorm)} == {True}


def refused(rank):
    with pytest.raises(dn.UserError, match="SYNC_GROUP_SIZE 3 does not divide the 2 processes"):
        tiny("MODEL.RETINANET.NORM", "SyncBN", "MODEL.NORM.SYNC_GROUP_SIZE", 3)


def test_groups_that_do_not_divide_the_processes():
    run_ranks(refused, 2)
