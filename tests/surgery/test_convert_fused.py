"""Activations that timm fuses into its norms, and GroupNorms: converted."""

import copy
import pickle
import re

import pytest
import torch
from norm_cases import close
from test_convert import NAMES, each_norm, images, norms, step_of, trained
from torch import nn

import domainnorm as dn
from domainnorm.surgery.freeze import freeze_batchnorm


def fused(**options):
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(2)
    norm = layers.BatchNormAct2d(8, act_layer=nn.SiLU, **options)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: torch.compile(m, backend="aot_eager")],
    ids=["deepcopy", "pickle", "compile"],
)
def test_fused_activations_are_kept_also_in_copies(copied):
    model = fused().double()
    twin = copied(dn.convert_batchnorm(copy.deepcopy(model), "BN"))
    for _ in range(2):
        (y, grads), (expected, of_model) = (step_of(m, images()) for m in (twin, model))
        close(y, expected)
        for a, b in zip(grads.values(), of_model.values(), strict=True):
            close(a, b)
    close(twin.eval()(images()), model.eval()(images()))
    assert [k.removeprefix("_orig_mod.") for k in twin.state_dict()] == list(model.state_dict())


@each_norm
def test_fused_activations_follow_every_norm(name):
    plain = dn.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(8)), name, **NAMES[name][1]).double()
    model = dn.convert_batchnorm(fused(), name, **NAMES[name][1])[1].double()
    x = images().repeat(1, 3, 1, 1)[:, :8]
    close(model(x), nn.functional.silu(plain(x)))
    again = dn.convert_batchnorm(nn.Sequential(model), "GhostBN", samples_per_group=2)
    if name not in ("GN", "FrozenBN"):
        close(again(x), nn.functional.silu(dn.convert_batchnorm(plain, "GhostBN", samples_per_group=2)(x)))


def test_fused_without_activation_and_in_fused_models_for_deployment():
    model = fused(apply_act=False).double()
    expected = model.eval()(images())
    dn.convert_batchnorm(model, "BN")
    close(model(images()), expected)
    close(dn.fuse(model)(images()), expected)
    active = fused().double().eval()
    expected = active(images())
    close(dn.fuse(dn.convert_batchnorm(active, "BN"))(images()), expected)


def test_a_list_of_domains_has_its_activation_too():
    model = dn.convert_batchnorm(fused(), "BN", num_domains=2).double()
    xs = [images(seed=k).repeat(1, 3, 1, 1)[:, :8] for k in range(2)]
    for k, y in enumerate(model[1](xs)):
        one = dn.convert_batchnorm(fused(), "BN")[1].double()
        close(y, one(xs[k]))


@pytest.mark.parametrize("first", ["BN", None])
def test_frozen_layers_keep_their_activation(first):
    """`SOLVER.FREEZE_NORM_AT` must not change what a model of timm computes."""
    model = fused().double().eval()
    expected = model(images())
    if first:
        dn.convert_batchnorm(model, first)
    close(freeze_batchnorm(model)(images()), expected)


# ---- GroupNorm -----------------------------------------------------------------------------------------------------


def group_normed(**options):
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8, **options), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.GroupNorm(1, 6)]
    return nn.Sequential(*layers).double()


def test_converted_group_norms_are_the_same_function():
    model = group_normed(eps=0.1)
    ours = dn.convert_groupnorm(copy.deepcopy(model))
    assert [type(m) for m in norms(ours).values()] == [dn.GroupedBatchNorm] * 2 and ours[1].eps == 0.1
    for y, expected in zip(trained(ours, images()), trained(model, images()), strict=True):
        close(y, expected)
    close(ours.eval()(images(1)), model.eval()(images(1)))
    assert [p.shape for p in ours.parameters()] == [p.shape for p in model.parameters()]


def test_group_norm_keeps_its_parameters_mode_and_dtype():
    model = group_normed().bfloat16().eval()
    model[1].weight.requires_grad_(False)
    before = list(model.parameters())
    dn.convert_groupnorm(model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert not model[1].weight.requires_grad and not model[1].training and model[1].running_var.dtype == torch.bfloat16
    assert model(images(dtype=torch.bfloat16)).dtype == torch.bfloat16
    bare = nn.GroupNorm(2, 4, affine=False)
    assert dn.convert_groupnorm(bare) is not bare and dn.convert_groupnorm(bare).weight is None


def test_recomputed_statistics_make_other_example_weights_possible():
    """Weight 0: GroupNorm with the population's moments of each channel group."""
    model = dn.convert_groupnorm(nn.Sequential(nn.GroupNorm(2, 4).double()))
    nn.init.normal_(model[0].weight)
    population = images(64).repeat(1, 2, 1, 1)[:, :4] * torch.tensor([1.0, 2, 3, 4])[:, None, None]
    dn.recompute_population_statistics(model, population.split(16), progress=False)
    x, groups = population[:5] + 1, population.unflatten(1, (2, 2))
    mean, var = (f(groups, (0, 2, 3, 4))[:, None, None, None] for f in (torch.mean, torch.var))
    expected = ((x.unflatten(1, (2, 2)) - mean) / (var + 1e-5).sqrt()).flatten(1, 2)
    y = dn.set_example_weight(model.eval(), 0.0)(x)
    torch.testing.assert_close(y, expected * model[0].weight[:, None, None], rtol=1e-3, atol=1e-3)
    own = dn.set_example_weight(model, 1.0)(x)
    close(own, nn.functional.group_norm(x, 2, model[0].weight))
    half = dn.set_example_weight(model, 0.5)(x)
    assert not torch.allclose(half, y) and not torch.allclose(half, own)


def test_timms_group_norms_with_activations():
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layers.GroupNormAct(8, num_groups=4, act_layer=nn.SiLU)).double()
    nn.init.normal_(model[1].weight)
    ours = dn.convert_groupnorm(copy.deepcopy(model))
    assert isinstance(ours[1], dn.GroupedBatchNorm) and list(norms(ours)) == ["1"]
    for mode in (True, False):
        close(ours.train(mode)(images()), model.train(mode)(images()))


def test_group_norms_with_a_forward_pass_of_their_own_are_refused():
    class Doubled(nn.GroupNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.GroupNorm(2, 4), Doubled(2, 4))
    first = model[0]
    with pytest.raises(TypeError, match=re.escape("1: Doubled has a forward pass of its own")):
        dn.convert_groupnorm(model)
    assert model[0] is first
