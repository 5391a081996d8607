"""Every norm in every place of a detector, by config keys alone."""

import copy

import pytest
import torch
from ranks import run_ranks
from rois import Head, rois
from test_mask_rcnn import batch, build, step, ungraded, without_proposals
from test_retinanet import images_and_targets, tiny
from torch import nn

import domainnorm as dn
from domainnorm.distributed.roi_shuffle import roi_permutation
from domainnorm.engine.check import check_model
from domainnorm.engine.describe import describe_normalization
from domainnorm.engine.freeze import freeze_norm
from domainnorm.layers import DomainBatchNorm
from domainnorm.layers.group_norm import GroupNorm
from domainnorm.modeling.norm import norm_options, roi_norm_options

LAYERS = {
    "BN": DomainBatchNorm,
    "GN": GroupNorm,
    "GhostBN": dn.GhostBatchNorm,
    "SeqNorm": dn.SeqNorm,
    "BGN": dn.BatchGroupNorm,
    "GBGN": dn.GroupedBatchNorm,
    "BRN": dn.BatchRenorm,
}
SMALL = {  # for four images
    "MODEL.NORM.GHOSTBN.SAMPLES_PER_GROUP": 2,
    "MODEL.NORM.SEQNORM.NUM_SAMPLE_GROUPS": 2,
    "MODEL.NORM.GBGN.NUM_CHANNEL_GROUPS": 4,
    "MODEL.NORM.BGN.NUM_GROUPS": 4,
}
HEAD_KEYS = {key.replace(".", "__"): value for key, value in SMALL.items()}
each_norm = pytest.mark.parametrize("norm", LAYERS)
BACKBONE = {"MODEL.BACKBONE.NAME": "mobilenet_v3_small"}


def words(options):
    return [word for pair in options.items() for word in pair]


def retinanet(**options):
    torch.manual_seed(0)
    keys = {key.replace("__", "."): value for key, value in options.items()}
    return tiny(*words(BACKBONE | SMALL | keys))


def layers_of(module):
    return [m for m in module.modules() if isinstance(m, (DomainBatchNorm, nn.GroupNorm))]


def train_step(model, n=4, seed=0):
    images, targets = images_and_targets(n, seed)
    model.train().zero_grad()
    losses = model(images, targets)
    sum(losses.values()).backward()
    return losses


def check_detector(model, infer=True):
    """A step with finite losses and gradients everywhere; detections; and the same after a state dict."""
    losses = train_step(model)
    assert all(value.isfinite() for value in losses.values())
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or p.grad.isnan().any())]
    assert missing == []
    twin = copy.deepcopy(model)
    train_step(twin, seed=1)
    twin.load_state_dict(model.state_dict())
    images = images_and_targets(2, seed=2)[0]
    with torch.no_grad():
        found, again = model.eval()(images), twin.eval()(images)
        alone = model(images[1:])
    torch.testing.assert_close(found, again, rtol=0, atol=0)
    torch.testing.assert_close(found[1:], alone, rtol=0, atol=0)
    assert all(value.isfinite().all() for image in found for value in image.values())


# ---- backbone, pyramid, RetinaNet's head ---------------------------------------------------------------------------


@each_norm
def test_backbone_and_pyramid(norm):
    model = retinanet(MODEL__BACKBONE__NORM=norm, MODEL__FPN__NORM=norm)
    body, fpn = layers_of(model.backbone.body), layers_of(model.backbone.fpn)
    assert len(body) == 34 and len(fpn) == 6
    assert {type(layer) for layer in body + fpn} == {LAYERS[norm]}
    check_detector(model)


@pytest.mark.parametrize("sgd", ["shared", "per_domain"])
@pytest.mark.parametrize("norm", [norm for norm in LAYERS if norm != "GN"])
def test_the_levels_of_a_retinanet_head(norm, sgd):
    """Each takes the three choices of Table 5."""
    prefix = "MODEL__RETINANET__"
    keys = {"NORM": norm, "SGD_STATISTICS": sgd, "POPULATION_STATISTICS": sgd, "AFFINE": sgd}
    model = retinanet(**{prefix + key: value for key, value in keys.items()})
    layers = layers_of(model.head)
    assert {type(layer) for layer in layers} == {LAYERS[norm]} and len(layers) == 4
    for layer in layers:
        assert (layer.num_domains, layer.sgd_statistics, layer.population_statistics, layer.affine) == (
            5,
            sgd,
            sgd,
            sgd,
        )
    check_detector(model)
    assert all((layer.num_batches_tracked > 0).all() for layer in layers)


def test_group_norm_in_a_retinanet_head():
    check_detector(retinanet(MODEL__RETINANET__NORM="GN"))


@pytest.mark.parametrize("norm", [norm for norm in LAYERS if norm != "GN"])
def test_statistics_are_recomputed_of_every_norm(norm):
    model = retinanet(MODEL__BACKBONE__NORM=norm, MODEL__RETINANET__NORM=norm)
    batches = [images_and_targets(4, seed) for seed in range(3)]
    weights = [p.clone() for p in model.parameters()]
    before = {name: layer.running_mean.clone() for name, layer in model.named_modules() if hasattr(layer, "sync")}
    dn.recompute_population_statistics(OnePair(model), batches, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    for name, mean in before.items():
        assert not torch.equal(model.get_submodule(name).running_mean, mean), name
    pooled = {name: layer.running_mean.clone() for name, layer in model.named_modules() if name in before}
    model = dn.recompute_population_statistics(OnePair(model), batches, progress=False).model
    for name, mean in pooled.items():
        torch.testing.assert_close(model.get_submodule(name).running_mean, mean)
    with torch.no_grad():
        assert all(d["scores"].isfinite().all() for d in model.eval()(batches[0][0]))


class OnePair(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pair):
        return self.model(*pair)


@pytest.mark.parametrize("norm", [norm for norm in LAYERS if norm != "GN"])
def test_exact_statistics_do_not_depend_on_the_batches(norm):
    model = retinanet(MODEL__BACKBONE__NORM=norm, MODEL__RETINANET__NORM=norm).double()
    images, targets = images_and_targets(8, dtype=torch.float64)
    found = []
    for sizes in ((4, 4), (8,)):
        batches = zip(torch.stack(images).split(sizes), [targets[: sizes[0]], targets[-sizes[0] :]], strict=False)
        dn.recompute_population_statistics(OnePair(model), batches, method="exact", progress=False)
        found.append([b.clone() for name, b in model.named_buffers() if "running" in name])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


# ---- the heads of Mask R-CNN ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["GhostBN", "SeqNorm", "BGN", "GBGN", "BRN"])
def test_heads_over_any_number_of_rois(norm):
    """More RoIs than a group, fewer, and none."""
    keys = HEAD_KEYS | {"MODEL__NORM__GHOSTBN__SAMPLES_PER_GROUP": 16, "MODEL__NORM__BRN__SAMPLES_PER_GROUP": 16}
    model = build(norm, **keys)
    heads = layers_of(model.roi_heads)
    assert {type(layer) for layer in heads} == {LAYERS[norm]} and len(heads) == 4
    for numbers, nothing in (((2, 1), False), ((0, 1), False), ((0, 0), False), ((0, 0), True)):
        model.train().zero_grad()
        losses = step(without_proposals(model) if nothing else model, *batch(*numbers))
        assert all(0 <= value < 100 for value in losses.values()), (numbers, losses)
        assert ungraded(model) == [], numbers
    buffers = [b.clone() for b in model.buffers()]
    for number in (0, 1, 5):
        box = torch.tensor([[5.0, 5, 30, 40]]).repeat(number, 1)
        model.rpn.filter_proposals = lambda *others, box=box: ([box], None)
        for statistics in ("population", "minibatch"):
            with torch.no_grad():
                (found,) = dn.set_statistics(model.eval(), statistics)([torch.rand(3, 64, 80)])
            assert all(value.isfinite().all() for value in found.values())
    torch.testing.assert_close(list(model.buffers()), buffers, rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["GhostBN", "SeqNorm", "BGN", "GBGN", "BRN"])
def test_a_head_under_minibatch_statistics_sees_one_image(norm):
    model = build(norm, **HEAD_KEYS)
    step(model, *batch(2, 3))
    dn.set_statistics(model.eval(), "minibatch")
    images = [torch.rand(3, 64, 80), torch.rand(3, 50, 60)]
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1:], model(images[1:]), rtol=0, atol=0)


# ---- the options of MODEL.NORM -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "key", "value", "attribute"),
    [
        ("GN", "GN.NUM_GROUPS", 4, "num_groups"),
        ("GhostBN", "GHOSTBN.SAMPLES_PER_GROUP", 3, "samples_per_group"),
        ("SeqNorm", "SEQNORM.NUM_CHANNEL_GROUPS", 2, "num_channel_groups"),
        ("SeqNorm", "SEQNORM.NUM_SAMPLE_GROUPS", 3, "num_sample_groups"),
        ("BGN", "BGN.NUM_GROUPS", 2, "num_groups"),
        ("BGN", "BGN.SYNC", True, "sync"),
        ("GBGN", "GBGN.NUM_CHANNEL_GROUPS", 2, "num_channel_groups"),
        ("GBGN", "GBGN.SAMPLES_PER_GROUP", 3, "samples_per_group"),
        ("BRN", "BRN.MOMENTUM", 0.25, "momentum"),
        ("BRN", "BRN.SYNC", True, "sync"),
    ],
)
def test_options_reach_the_layers(norm, key, value, attribute):
    options = {f"MODEL.NORM.{key}": value}
    for place in ("BACKBONE", "FPN", "RETINANET"):
        model = retinanet(**options | {f"MODEL.{place}.NORM": norm})
        layers = [m for m in layers_of(model) if type(m) is LAYERS[norm] and m.weight.shape[-1] % 8 == 0]
        assert layers and {getattr(layer, attribute) for layer in layers} == {value}, place
    heads = build(norm, **{key.replace(".", "__"): value for key, value in options.items()}).roi_heads
    assert {getattr(layer, attribute) for layer in layers_of(heads)} == {value}


@pytest.mark.parametrize(("accumulate", "times"), [(1, 1), (2, 2)])
def test_limits_of_batch_renorm_grow_over_the_iterations(accumulate, times):
    """In training forwards, of which accumulation makes several an iteration."""
    keys = {"R_MAX": 4.0, "D_MAX": 6.0, "BN_UNTIL": 10, "R_MAX_AT": 0.5, "D_MAX_AT": 20, "SAMPLES_PER_GROUP": 2}
    solver = ["SOLVER.MAX_ITER", 100, "SOLVER.ACCUMULATE", accumulate]
    cfg = dn.load_config(None, words({f"MODEL.NORM.BRN.{k}": v for k, v in keys.items()}) + solver)
    options = norm_options(cfg, "BRN")
    assert options["r_max"] == [(10 * times, 1.0), (50 * times, 4.0)]
    assert options["d_max"] == [(10 * times, 0.0), (20 * times, 6.0)]
    assert options["samples_per_group"] == 2 and "allow_smaller_batch" not in options
    assert roi_norm_options(cfg, "BRN")["allow_smaller_batch"]


def test_limits_of_batch_renorm_from_the_first_step():
    at_once = ["MODEL.NORM.BRN.BN_UNTIL", 0, "MODEL.NORM.BRN.R_MAX_AT", 0, "MODEL.NORM.BRN.D_MAX_AT", 0]
    options = norm_options(dn.load_config(None, at_once), "BRN")
    assert (options["r_max"], options["d_max"], options["samples_per_group"]) == (3.0, 5.0, None)


@pytest.mark.parametrize("at", [0.3, 0.5])
def test_batch_norm_lasts_until_it_is_said_to(at):
    keys = ["MODEL.NORM.BRN.BN_UNTIL", 0.5, "MODEL.NORM.BRN.R_MAX_AT", at, "SOLVER.MAX_ITER", 100]
    try:
        limit = norm_options(dn.load_config(None, keys), "BRN")["r_max"]
    except dn.UserError as error:
        assert "BN_UNTIL" in str(error)
        return
    layer = dn.BatchRenorm(2, r_max=limit, d_max=0.0)
    nn.init.constant_(layer.running_var, 0.01)
    x = torch.randn(8, 2)
    torch.testing.assert_close(layer(x), nn.BatchNorm1d(2)(x))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("GN.NUM_GROUPS", 0, "above 0, got 0"),
        ("GHOSTBN.SAMPLES_PER_GROUP", -1, "above 0, got -1"),
        ("GHOSTBN.SAMPLES_PER_GROUP", 2.5, "takes int"),
        ("SEQNORM.NUM_CHANNEL_GROUPS", 0, "above 0"),
        ("SEQNORM.NUM_SAMPLE_GROUPS", 0, "above 0"),
        ("BGN.NUM_GROUPS", 0, "above 0"),
        ("BGN.SYNC", 1, "takes bool"),
        ("GBGN.NUM_CHANNEL_GROUPS", 0, "above 0"),
        ("GBGN.SAMPLES_PER_GROUP", 0, "above 0"),
        ("BRN.R_MAX", 0.5, "from 1 on, got 0.5"),
        ("BRN.R_MAX", float("nan"), "from 1 on, got nan"),
        ("BRN.D_MAX", -1.0, "from 0 on"),
        ("BRN.MOMENTUM", 2.0, "from 0 to 1"),
        ("BRN.BN_UNTIL", -1, "from 0 on"),
        ("BRN.GROUP_SIZES", 1, "nearest known key is MODEL.NORM.BRN.SAMPLES_PER_GROUP"),
    ],
)
def test_wrong_options_are_one_line_that_names_the_key(key, value, message):
    with pytest.raises(dn.UserError, match=message) as error:
        dn.load_config(None, [f"MODEL.NORM.{key}", value])
    assert f"MODEL.NORM.{key}" in str(error.value) and "\n" not in str(error.value)


def test_micro_batches_are_of_one_process():
    with pytest.raises(dn.UserError, match=r"SAMPLES_PER_GROUP 4 contradicts MODEL\.NORM\.BRN\.SYNC True"):
        dn.load_config(None, ["MODEL.NORM.BRN.SAMPLES_PER_GROUP", 4, "MODEL.NORM.BRN.SYNC", True])


# ---- frozen, fused, described --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [norm for norm in LAYERS if norm != "GN"])
def test_frozen_stages_keep_their_buffers(norm):
    model = retinanet(MODEL__BACKBONE__NORM=norm, MODEL__BACKBONE__FREEZE_AT=2)
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    train_step(model)
    changed = {name for name, value in model.named_buffers() if "running" in name and not value.equal(before[name])}
    frozen = {n.rpartition(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen and {name.split(".")[2] for name in frozen} == {"0", "1"}
    assert changed == {name for name in before if not name.startswith(tuple(frozen))}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("norm", ["SeqNorm", "GhostBN", "GBGN"])
def test_statistics_frozen_in_the_middle_of_training(norm):
    cfg = dn.load_config(None, ["SOLVER.FREEZE_NORM_AT", 5])
    model = retinanet(MODEL__BACKBONE__NORM=norm)
    train_step(model)
    check_model(cfg, model)
    parameters = list(model.parameters())
    freeze_norm(cfg, model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    before = [b.clone() for b in model.buffers()]
    train_step(model, n=1)  # fewer than a group: frozen statistics need none
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert all(p.grad is not None for p in model.parameters())
    assert "frozen" in describe_normalization(cfg, model)


@pytest.mark.parametrize(
    ("norm", "left"), [("GhostBN", 0), ("BRN", 0), ("SeqNorm", 34), ("BGN", 34), ("GBGN", 34), ("BN", 0)]
)
def test_what_is_fused_for_deployment(norm, left):
    model = retinanet(MODEL__BACKBONE__NORM=norm)
    train_step(model)
    model.double().eval()
    fused = dn.fuse(model)
    assert len(layers_of(fused.backbone)) == left
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused.backbone(x), model.backbone(x), rtol=1e-9, atol=1e-9)
    dn.set_example_weight(model, 0.1)
    with pytest.raises(ValueError, match=r"example_weight=0\.1, which cannot be fused"):
        dn.fuse(model)


@pytest.mark.parametrize("norm", ["GhostBN", "SeqNorm", "GBGN"])
def test_virtual_batches_are_refused_where_samples_are_split(norm):
    model = retinanet(MODEL__BACKBONE__NORM=norm)
    refused = pytest.raises(ValueError, match=rf"backbone\.body\.\S+ \({LAYERS[norm].__name__}\).*larger groups")
    with refused, dn.virtual_batch(model, torch.rand(2, 3, 64, 64)):
        pass


@pytest.mark.parametrize(
    ("norm", "text"),
    [
        ("BN", "16 images x height x width, of one process"),
        ("GN", "a sample alone, by groups of channels"),
        ("GhostBN", "GhostBatchNorm (samples_per_group=2) of 16 images x height x width, of one process"),
        (
            "SeqNorm",
            "SeqNorm (num_channel_groups=4, num_sample_groups=2) of 16 images x height x width, of one process",
        ),
        ("BGN", "BatchGroupNorm (num_groups=4) of 16 images x height x width, of one process"),
        ("GBGN", "GroupedBatchNorm (num_channel_groups=4, samples_per_group=2) of 16 images x height x width"),
        ("BRN", "16 images x height x width, of one process"),
    ],
)
def test_the_log_describes_each_norm(norm, text):
    model = retinanet(MODEL__BACKBONE__NORM=norm)
    line = describe_normalization(dn.load_config(None, words(SMALL)), model)
    assert f"backbone.body x34: {text}" in line and "\n" not in line


# ---- groups of RoIs that are shuffled over the processes -----------------------------------------------------------


def in_order(rank, counts):
    torch.manual_seed(3)
    body = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(12, 4))
    head = dn.RoIShuffle(Head(body).double(), seed=5, in_order=True)
    x = rois(rank, counts[rank]).requires_grad_()
    y = head(x)
    y["all"].pow(3).sum().backward()
    alone = x.detach().clone().requires_grad_()
    body(alone).pow(3).sum().backward()  # of each row alone, so the same wherever it is computed
    return {"batch": head.module.batches[0], "y": y["all"].detach(), "grad": x.grad, "expected": alone.grad}, body


@pytest.mark.parametrize("counts", [(5, 8), (0, 7), (3, 0, 6), (1, 0, 0), (0, 0, 0)])
def test_rows_arrive_in_the_order_of_the_permutation_and_go_back(counts):
    world = len(counts)
    found = run_ranks(in_order, world, counts)
    everyone = torch.cat([rois(rank, count) for rank, count in enumerate(counts)])
    permuted = everyone[torch.from_numpy(roi_permutation(5, 0, sum(counts)))]
    assert torch.equal(torch.cat([of_rank["batch"] for of_rank, _ in found]), permuted)
    for rank, (of_rank, body) in enumerate(found):
        torch.testing.assert_close(of_rank["y"], body(rois(rank, counts[rank])).detach())
        torch.testing.assert_close(of_rank["grad"], of_rank["expected"])


@pytest.mark.parametrize(("norm", "mixed"), [("GhostBN", True), ("SeqNorm", True), ("BN", False), ("BGN", False)])
def test_a_shuffled_head_with_groups_of_rois_gets_them_in_order(norm, mixed):
    heads = build(norm, shuffle=True, **HEAD_KEYS).roi_heads
    assert heads.box_shuffle.in_order is heads.mask_shuffle.in_order is mixed


@pytest.mark.parametrize("place", ["MODEL.BACKBONE.NORM", "MODEL.FPN.NORM", "MODEL.RETINANET.NORM"])
def test_pieces_that_split_channels_of_many_sizes_in_space_are_refused(place):
    with pytest.raises(dn.UserError, match=r"NUM_GROUPS 512 splits the \d+ channels of .* in space.*SPLIT_SPACE False"):
        tiny(place, "BGN", "MODEL.NORM.BGN.NUM_GROUPS", 512)
    model = tiny(place, "BGN", "MODEL.NORM.BGN.NUM_GROUPS", 512, "MODEL.NORM.BGN.SPLIT_SPACE", False)
    assert all(m.num_groups <= m.num_features for m in model.modules() if isinstance(m, dn.BatchGroupNorm))
