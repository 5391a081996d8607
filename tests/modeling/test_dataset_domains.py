"""Detectors and classifiers whose norms have data sets for domains: training, several ranks, resume, evaluation."""

import copy
import json

import pytest
import tiny
import torch
from ranks import run_ranks
from test_mask_rcnn import batch as rcnn_batch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import domainnorm as dn
from domainnorm.engine.describe import describe_normalization
from domainnorm.layers import DomainBatchNorm
from domainnorm.modeling import RetinaNet

BOTH = {"MODEL__NORM_DOMAINS": "dataset", "MODEL__RETINANET__NORM_DOMAINS": "level_and_dataset"}
NAMES = ["day", "night"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains")
    return [tiny.write_dataset(folder / "day", 8), tiny.write_dataset(folder / "night", 6)]


def config(sets, output, **others):
    known = {"DATASETS__TRAIN": sets, "DATASETS__DOMAINS": NAMES, "MODEL__FPN__NORM": "BN"} | BOTH
    return tiny.config(sets[0], output, **known | others)


def norms(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, DomainBatchNorm)}


def batch(count, seed=0, domain=None):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, 64, 64, generator=generator) for _ in range(count)]
    box = torch.tensor([[8.0, 8.0, 40.0, 36.0]])
    targets = [{"boxes": box, "labels": torch.tensor([k % 2])} for k in range(count)]
    if domain is not None:
        for k, target in enumerate(targets):
            target["domain"] = torch.tensor(domain[k] if isinstance(domain, list) else domain)
    return images, targets


def test_every_norm_that_follows_batches_has_both_domains(sets, tmp_path):
    model = dn.build_model(config(sets, tmp_path))
    for name, layer in norms(model).items():
        assert layer.domain_names == ("day", "night"), name
        assert layer.num_domains == (10 if name.startswith("head.") else 2), name
    assert any(name.startswith("backbone.fpn") for name in norms(model))


def test_an_image_is_normalized_with_those_of_its_domain(sets, tmp_path):
    """Level and data set, everywhere: the statistics of each domain are those of a model that sees it alone."""
    torch.manual_seed(0)
    both = dn.build_model(config(sets, tmp_path)).double().train()
    plain = {"MODEL__NORM_DOMAINS": "", "MODEL__RETINANET__NORM_DOMAINS": "level"}
    single = dn.build_model(config(sets, tmp_path, **plain)).double()
    shared = {k: v[:1].squeeze(0) if v.shape[:1] == (2,) else v for k, v in both.state_dict().items()}
    for name, value in single.state_dict().items():
        value.copy_(shared[name][: len(value)] if value.ndim else shared[name])
    images, targets = batch(6, domain=[0, 1, 1, 0, 1, 0])
    images = [image.double() for image in images]
    both(images, targets)
    for k in range(2):
        twin = dn.build_model(config(sets, tmp_path, **plain)).double().train()
        twin.load_state_dict(single.state_dict())
        chosen = [i for i in range(6) if int(targets[i]["domain"]) == k]
        twin([images[i] for i in chosen], [targets[i] for i in chosen])
        for name, layer in norms(twin).items():
            got = norms(both)[name].running_var.unflatten(0, (2, -1))[k].reshape(layer.running_var.shape)
            torch.testing.assert_close(got, layer.running_var, atol=1e-9, rtol=1e-9)


def test_a_domain_that_is_absent_keeps_its_statistics(sets, tmp_path):
    model = dn.build_model(config(sets, tmp_path)).train()
    before = {name: layer.running_mean.clone() for name, layer in norms(model).items()}
    sum(model(*batch(4, domain=1)).values()).backward()
    for name, layer in norms(model).items():
        half = layer.num_domains // 2
        assert torch.equal(layer.running_mean[:half], before[name][:half]), name
        assert not torch.equal(layer.running_mean[half:], before[name][half:]), name
        assert layer.num_batches_tracked[:half].sum() == 0
    assert all(p.grad is not None for p in model.parameters())


def test_targets_without_a_domain_are_refused(sets, tmp_path):
    with pytest.raises(ValueError, match="each target needs its 'domain'"):
        dn.build_model(config(sets, tmp_path)).train()(*batch(2))


@pytest.mark.parametrize(
    ("kind", "count", "text"),
    [
        ("level", 5, "of each level,"),
        ("dataset", 2, "x levels of each domain,"),
        ("level_and_dataset", 10, "level and"),
    ],
)
def test_what_a_domain_of_the_head_is(sets, tmp_path, kind, count, text):
    cfg = config(sets, tmp_path, MODEL__RETINANET__NORM_DOMAINS=kind)
    model = dn.build_model(cfg).train()
    losses = model(*batch(4, domain=[0, 1, 0, 1]))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert norms(model)["head.classification_head.conv.0.1"].running_mean.shape == (count, 8)
    assert text in describe_normalization(cfg, model).split("head.classification_head")[1]


def ranks_step(rank, words, domains):
    """Losses and statistics of a step in which this rank has images of `domains[rank]` only."""
    cfg = dn.load_config(None, words)
    torch.manual_seed(0)
    model = dn.build_model(cfg).double().train()
    network = DistributedDataParallel(model) if len(domains) > 1 else model
    count = 4 // len(domains)
    images, targets = batch(4, domain=[d for d in (domains if len(domains) > 1 else [0, 1]) for _ in range(4 // 2)])
    part = slice(rank * count, (rank + 1) * count)
    sum(network([x.double() for x in images[part]], targets[part]).values()).backward()
    return {name: layer.running_var for name, layer in norms(model).items()}, [p.grad for p in model.parameters()]


def test_ranks_that_lack_a_domain_take_the_step_of_one(sets, tmp_path):
    sync = {f"MODEL__{place}__NORM": "SyncBN" for place in ("BACKBONE", "FPN", "RETINANET")}
    known = {"DATASETS__TRAIN": sets, "DATASETS__DOMAINS": NAMES} | BOTH | sync
    words = tiny.options(sets[0], tmp_path, **known)
    statistics, gradients = ranks_step(0, words, [0])
    for got, got_gradients in run_ranks(ranks_step, 2, words, [0, 1]):
        for name, value in statistics.items():
            torch.testing.assert_close(got[name], value, atol=1e-9, rtol=1e-9)
        for a, b in zip(got_gradients, gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)


def test_rois_have_the_domain_of_their_image(sets, tmp_path):
    cfg = tiny.config(
        sets[0],
        tmp_path,
        **tiny.MASK_RCNN | {"DATASETS__TRAIN": sets, "DATASETS__DOMAINS": NAMES, "MODEL__NORM_DOMAINS": "dataset"},
    )
    model = dn.build_model(cfg).train()
    images, targets = rcnn_batch(2, 2)
    for k, target in enumerate(targets):
        target["domain"] = torch.tensor(k)
    losses = model(images, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    layers = norms(model.roi_heads)
    assert len(layers) == 2 and all(layer.num_batches_tracked.tolist() == [1, 1] for layer in layers.values())
    with dn.use_domain(model.eval(), "night"):
        assert len(model(images)) == 2
    with pytest.raises(dn.UserError, match=r"SHUFFLE True contradicts MODEL.NORM_DOMAINS"):
        dn.load_config(None, ["DATASETS.DOMAINS", NAMES, "DATASETS.TRAIN", sets, "MODEL.NORM_DOMAINS", "dataset",
                              "MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.SHUFFLE", True,
                              "MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_BOX_HEAD.NUM_CONV", 4])  # fmt: skip


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(sets, tmp_path):
    ways = {"DATALOADER__RATIOS": [1, 1], "SOLVER__ACCUMULATE": 2, "DATALOADER__COMPOSITION": "one_domain_per_batch"}
    whole = dn.train(config(sets, tmp_path / "a", **ways))
    dn.train(config(sets, tmp_path / "b", SOLVER__MAX_ITER=2, **ways))
    resumed = dn.train(config(sets, tmp_path / "b", **ways), resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("rule", ["given", "nearest", "average"])
def test_results_of_each_domain_and_overall(sets, tmp_path, rule):
    known = {"DATASETS__TEST": sets, "DATASETS__TEST_DOMAINS": NAMES, "TEST__DOMAIN": rule}
    cfg = config(sets, tmp_path, **known)
    model = dn.build_model(cfg)
    buffers = [b.clone() for b in model.buffers()]
    results = dn.evaluate(cfg, model, ["population", "minibatch"])
    for found in results.values():
        assert list(found) == [*sets, "overall"] and all(scores["bbox"]["AP"] >= 0 for scores in found.values())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(layer.current_domain is None for layer in norms(model).values())
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["population"]["overall"]["bbox"]["AP"] == results["population"]["overall"]["bbox"]["AP"]


def test_overall_is_the_score_of_one_set_of_all_images(sets, tmp_path):
    """The same set twice, under two names: overall equals each."""
    cfg = config(sets, tmp_path, DATASETS__TEST=[sets[0], sets[0].replace("/images", "/./images")],
                 DATASETS__TEST_DOMAINS=["day", "day"])  # fmt: skip
    first, second, overall = dn.evaluate(cfg, dn.build_model(cfg), "population")["population"].values()
    for metric in ("AP", "AP50", "AP75"):
        assert first["bbox"][metric] == second["bbox"][metric] == overall["bbox"][metric] > -1


def test_an_unknown_domain_is_refused_where_it_must_be_given(sets, tmp_path):
    cfg = config(sets, tmp_path, DATASETS__TEST=sets, DATASETS__TEST_DOMAINS=["day", ""])
    with pytest.raises(dn.UserError, match=r"the domain of .*night.* is not known; name it in DATASETS.TEST_DOMAINS"):
        dn.evaluate(cfg, dn.build_model(cfg))


def test_statistics_are_recomputed_for_each_domain(sets, tmp_path):
    known = {"DATASETS__TEST": sets, "DATASETS__TEST_DOMAINS": NAMES, "TEST__RECOMPUTE__NUM_SAMPLES": 8}
    cfg = config(sets, tmp_path, **known)
    model = dn.build_model(cfg)
    assert "recomputed" in dn.evaluate(cfg, model, "recomputed")


def test_a_new_domain_of_a_trained_detector(sets, tmp_path):
    plain = {"MODEL__NORM_DOMAINS": "", "MODEL__RETINANET__NORM_DOMAINS": "level"}
    model = dn.train(config(sets, tmp_path, SOLVER__MAX_ITER=2, **plain)).eval()
    assert isinstance(model, RetinaNet)
    images, _ = batch(3, seed=5)
    before = model(images)
    dn.add_domain(model, [[image * 0.3] for image in images], "dark", method="exact", progress=False)
    with dn.use_domain(model, "0"):
        for a, b in zip(before, model(images), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
    with dn.use_domain(model, "dark"):
        assert len(model(images)) == 3
    with dn.use_domain(model, 0):
        model.train()(*batch(2, domain=1))  # it is trained on as any other


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL.NORM_DOMAINS", "dataset"], r"MODEL.NORM_DOMAINS 'dataset' contradicts DATASETS.DOMAINS \[\]"),
        (["MODEL.RETINANET.NORM_DOMAINS", "dataset"], "contradicts MODEL.NORM_DOMAINS ''"),
        (["MODEL.DATASET_NORM.AFFINE", "per_domain"], "MODEL.DATASET_NORM.AFFINE 'per_domain' contradicts"),
        (["TEST.DOMAIN", "best"], "TEST.DOMAIN takes one of"),
    ],
)
def test_contradictions(words, message):
    with pytest.raises(dn.UserError, match=message):
        dn.load_config(None, words)


def test_classifiers_have_domains_too(tmp_path):
    words = ["MODEL.META_ARCHITECTURE", "Classifier", "MODEL.BACKBONE.NAME", "cifar_resnet8", "MODEL.DEVICE", "cpu",
             "MODEL.BACKBONE.NORM", "GhostBN", "MODEL.NORM.GHOSTBN.SAMPLES_PER_GROUP", 2, "INPUT.CROP_SIZE", 16,
             "DATASETS.TRAIN", ["a", "b"], "DATASETS.DOMAINS", NAMES, "MODEL.NORM_DOMAINS", "dataset",
             "MODEL.CLASSIFIER.NUM_CLASSES", 3]  # fmt: skip
    model = dn.build_model(dn.load_config(None, words))
    targets = [{"labels": torch.tensor(k % 3), "domain": torch.tensor(k % 2)} for k in range(8)]
    assert model.train()([torch.rand(3, 16, 16)] * 8, targets)["loss_cls"].isfinite()
    assert all(layer.num_batches_tracked.tolist() == [1, 1] for layer in norms(model).values())
    with dn.use_domain(model.eval(), "night"):
        assert model([torch.rand(3, 16, 16)]).shape == (1, 3)


def test_under_autocast_statistics_stay_float32(sets, tmp_path):
    amp = {"SOLVER__AMP__ENABLED": True, "SOLVER__MAX_ITER": 2, "DATALOADER__RATIOS": [1, 1]}
    size = {"INPUT__MIN_SIZE_TRAIN": [128], "INPUT__MAX_SIZE_TRAIN": 128}  # half-precision 1 x 1 maps break on a CPU
    model = dn.train(config(sets, tmp_path, **amp | size))
    for layer in norms(model).values():
        assert layer.running_mean.dtype == torch.float32 and layer.num_batches_tracked.min() == 2


def test_activation_checkpointing_of_the_backbone(sets, tmp_path):
    torch.manual_seed(0)
    model = dn.build_model(config(sets, tmp_path)).double().train()
    twin = copy.deepcopy(model)
    body = twin.backbone.forward
    twin.backbone.forward = lambda x: checkpoint(body, x, use_reentrant=False)
    for step in range(2):
        images, targets = batch(4, seed=step, domain=[0, 1, 1, 0] if step else [1, 1, 0, 0])
        images = [image.double() for image in images]
        for network in (model, twin):
            network.zero_grad()
            sum(network(images, targets).values()).backward()
        for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=1e-9, msg=name)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)
