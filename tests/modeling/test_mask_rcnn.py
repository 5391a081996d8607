"""Faster and Mask R-CNN: torchvision's numbers with torchvision's weights, any number of RoIs, honest inference."""

import pytest
import torch
import torchvision
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel

import domainnorm as dn
from domainnorm.layers import DomainBatchNorm
from domainnorm.modeling.weights import load_weights

NORMS = ("", "BN", "SyncBN", "GN", "FrozenBN")


def build(norm="BN", mask=True, shuffle=False, **others):
    chosen = {
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.MASK_ON": mask,
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": "mobilenet_v3_small",
        "MODEL.BACKBONE.NORM": "GN",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.FPN.OUT_CHANNELS": 8,
        "MODEL.ANCHOR_GENERATOR.SIZES": [8, 16, 32, 64, 96],
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 40,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
        "MODEL.ROI_HEADS.NUM_CLASSES": 3,
        "MODEL.ROI_HEADS.SHUFFLE": shuffle,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 2,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": 8,
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        "MODEL.ROI_BOX_HEAD.NORM": norm,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 2,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
        "MODEL.ROI_MASK_HEAD.NORM": norm if mask else "",
        "INPUT.MIN_SIZE_TEST": 64,
        "INPUT.MAX_SIZE_TEST": 96,
    }
    chosen |= {key.replace("__", "."): value for key, value in others.items()}
    torch.manual_seed(0)
    return dn.build_model(dn.load_config(None, [word for pair in chosen.items() for word in pair]))


def sample(number, seed=0, size=(64, 80)):
    """An image with `number` objects."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(number, 2, generator=generator) * 30
    boxes = torch.cat([corners, corners + 12 + 20 * torch.rand(number, 2, generator=generator)], 1)
    masks = torch.zeros(number, *size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y0:y1, x0 : (x0 + x1) // 2] = 1
    target = {"boxes": boxes, "labels": torch.arange(number) % 3, "masks": masks}
    return torch.rand(3, *size, generator=generator), target


def batch(*numbers, seed=0):
    return map(list, zip(*(sample(n, seed + i) for i, n in enumerate(numbers)), strict=True))


def without_proposals(model):
    """As if the RPN found nothing; ground truth boxes are proposals too, so their images have none either."""
    model.rpn.filter_proposals = lambda proposals, *others: ([p[:0] for p in proposals], None)
    return model


def step(model, images, targets, amp=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        losses = model(images, targets)
    sum(losses.values()).backward()
    return {name: float(value.detach()) for name, value in losses.items()}


def ungraded(model):
    return [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]


V1 = {"MODEL__BACKBONE__NORM": "FrozenBN", "MODEL__ROI_BOX_HEAD__NUM_CONV": 0, "MODEL__ROI_BOX_HEAD__NUM_FC": 2}
V2 = {
    "MODEL__RPN__NUM_CONV": 2,
    "MODEL__FPN__NORM": "BN",
    "MODEL__BACKBONE__NORM": "BN",
    "MODEL__ROI_BOX_HEAD__NUM_CONV": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize("version", ["", "_v2"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_torchvision_checkpoints_load_and_detect_the_same(version, shuffle, tmp_path):
    theirs = getattr(torchvision.models.detection, f"maskrcnn_resnet50_fpn{version}")(
        weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96, box_score_thresh=0.0
    )
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    options = {
        "MODEL__BACKBONE__NORM": "FrozenBN",
        "MODEL__ROI_BOX_HEAD__NUM_CONV": 0,
        "MODEL__ROI_BOX_HEAD__NUM_FC": 2,
    }
    options = V2 if version else options
    ours = build(
        "BN" if version else "",
        shuffle=shuffle,
        **options,
        MODEL__BACKBONE__NAME="resnet50",
        MODEL__FPN__OUT_CHANNELS=256,
        MODEL__ANCHOR_GENERATOR__SIZES=[32, 64, 128, 256, 512],
        MODEL__RPN__POST_NMS_TOPK_TEST=1000,
        MODEL__ROI_BOX_HEAD__CONV_DIM=256,
        MODEL__ROI_BOX_HEAD__FC_DIM=1024,
        MODEL__ROI_MASK_HEAD__NUM_CONV=4,
        MODEL__ROI_MASK_HEAD__CONV_DIM=256,
        MODEL__WEIGHTS=str(tmp_path / "theirs.pth"),
    )
    image = torch.rand(3, 60, 70)
    with torch.no_grad():
        (expected,), (got,) = theirs.eval()([image]), ours.eval()([image])
    assert len(expected["boxes"]) == 100
    expected["labels"] -= 1
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_weights_of_a_shuffled_model_load_into_one_that_is_not_and_back():
    shuffled, plain = build(shuffle=True), build(shuffle=False)
    step(shuffled, *batch(2, 1))
    assert int(shuffled.roi_heads.box_shuffle.step) == int(shuffled.roi_heads.mask_shuffle.step) == 1
    load_weights(plain, shuffled.state_dict(), "shuffled")
    load_weights(shuffled, plain.state_dict(), "plain")
    assert shuffled.state_dict().keys() - plain.state_dict().keys() == {
        "roi_heads.box_shuffle.step",
        "roi_heads.mask_shuffle.step",
    }


def test_losses_equal_torchvisions_up_to_the_rpns_normalizer():
    """With all anchors and RoIs sampled, nothing is random; torchvision divides the RPN's sums by what was sampled."""
    model = build("", MODEL__RPN__BATCH_SIZE_PER_IMAGE=100000, MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE=1000).double()
    images, targets = batch(3, 2)
    images = [image.double() for image in images]
    targets = [t | {"boxes": t["boxes"].double()} for t in targets]
    own = model(images, targets)
    heads, rpn = model.roi_heads, model.rpn
    seen = {}
    original = type(rpn).__mro__[1].compute_loss
    sampler = rpn.fg_bg_sampler

    def compute_loss(objectness, deltas, labels, goals):
        seen["sampled"] = sum(int((label >= 0).sum()) for label in labels)
        return original(rpn, objectness, deltas, labels, goals)

    rpn.compute_loss = compute_loss
    heads.forward = type(heads).__mro__[1].forward.__get__(heads)
    theirs = model(images, targets)
    share = seen["sampled"] / (sampler.batch_size_per_image * 2)
    expected = {
        "loss_cls": theirs["loss_classifier"],
        "loss_box_reg": theirs["loss_box_reg"],
        "loss_mask": theirs["loss_mask"],
        "loss_objectness": theirs["loss_objectness"].double() * share,  # float32 in torchvision
        "loss_rpn_box_reg": theirs["loss_rpn_box_reg"] * share,
    }
    torch.testing.assert_close(own.pop("loss_objectness"), expected.pop("loss_objectness"))
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_any_number_of_objects_and_rois(norm, amp):
    for numbers, nothing in (((2, 1), False), ((0, 0), False), ((1, 0), False), ((0, 0), True)):
        model = build(norm)
        if nothing:
            without_proposals(model)
        losses = step(model, *batch(*numbers), amp)
        assert all(0 <= value < 100 for value in losses.values()), (numbers, losses)
        assert ungraded(model) == [], numbers
        if nothing:
            assert losses["loss_cls"] == losses["loss_box_reg"] == losses["loss_mask"] == 0
        if sum(numbers):
            assert losses["loss_mask"] > 0


def test_boxes_alone():
    model = build(mask=False)
    images, targets = batch(2, 1)
    losses = step(model, images, [{k: t[k] for k in ("boxes", "labels")} for t in targets])
    assert "loss_mask" not in losses and ungraded(model) == []
    with torch.no_grad():
        assert model.eval()(images)[0].keys() == {"boxes", "scores", "labels"}


@pytest.mark.parametrize("statistics", ["population", "minibatch"])
def test_a_prediction_depends_on_its_own_image_only(statistics):
    model = build()
    for seed in range(2):
        step(model, *batch(2, 3, seed=seed))
    dn.set_statistics(model.eval(), statistics)
    images = [sample(1, seed, size)[0] for seed, size in enumerate([(64, 80), (50, 50), (90, 40)])]
    buffers = [b.clone() for b in model.buffers()]
    with torch.no_grad():
        together, backwards = model(images), model(images[::-1])[::-1]
        alone = [model([image])[0] for image in images]
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    torch.testing.assert_close(backwards, alone, rtol=0, atol=0)
    torch.testing.assert_close(list(model.buffers()), buffers, rtol=0, atol=0)
    for image, found in zip(images, alone, strict=True):
        assert found["masks"].shape == (len(found["boxes"]), 1, *image.shape[1:])
        assert found["labels"].min() >= 0 and found["labels"].max() <= 2


def test_the_two_statistics_differ():
    model = build().eval()
    image = sample(1)[0]
    with torch.no_grad():
        population = model([image])[0]["scores"]
        minibatch = dn.set_statistics(model, "minibatch")([image])[0]["scores"]
    assert population.tolist() != minibatch.tolist()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("statistics", ["population", "minibatch"])
@pytest.mark.parametrize("number", [0, 1])
def test_one_roi_or_none_in_inference(norm, statistics, number):
    model = dn.set_statistics(build(norm).eval(), statistics)
    box = torch.tensor([[5.0, 5, 30, 40]])[:number]
    model.rpn.filter_proposals = lambda *others: ([box], None)
    with torch.no_grad():
        (found,) = model([torch.rand(3, 64, 80)])
    assert all(value.isfinite().all() for value in found.values())
    assert (len(found["boxes"]) > 0) == (number > 0)
    assert found["masks"].shape[1:] == (1, 64, 80)


def in_ranks(rank, norm, shuffle, amp, numbers, nothing):
    """Two steps under DDP, which would hang or raise without a gradient for every parameter."""
    model = build(norm, shuffle=shuffle)
    network = DistributedDataParallel(model)
    network.broadcast_buffers = False
    if nothing:
        without_proposals(model)
    losses = []
    for seed in range(2):
        network.zero_grad()
        losses.append(step(network, *batch(*numbers[rank], seed=seed + 10 * rank), amp))
        assert ungraded(model) == []
    return losses, [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(
    ("norm", "shuffle"), [("BN", False), ("BN", True), ("SyncBN", False), ("GN", False), ("", True)]
)
def test_ranks_without_objects_or_rois(norm, shuffle, amp):
    for numbers, nothing in ((((2,), (0,)), False), (((0,), (0,)), False), (((0,), (0,)), True)):
        results = run_ranks(in_ranks, 2, norm, shuffle, amp, numbers, nothing)
        for losses, grads in results:
            assert all(0 <= value < 100 for step_losses in losses for value in step_losses.values())
            torch.testing.assert_close(grads, results[0][1])


def whole_step(rank, norm, shuffle, world):
    """Gradients of one step on six images, spread over the ranks; all anchors and RoIs are sampled."""
    torch.use_deterministic_algorithms(True)
    model = build(norm, shuffle=shuffle, MODEL__RPN__BATCH_SIZE_PER_IMAGE=100000).double()
    images, targets = batch(3, 0, 2, 1, 0, 1)
    own = slice(6 * rank // world, 6 * (rank + 1) // world)
    images = [image.double() for image in images[own]]
    targets = [target | {"boxes": target["boxes"].double()} for target in targets[own]]
    network = DistributedDataParallel(model) if world > 1 else model
    losses = step(network, images, targets)
    return losses, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("norm", ["SyncBN", "GN"])
@pytest.mark.parametrize(("shuffle", "world"), [(False, 2), (True, 2), (True, 3)])
def test_processes_take_the_step_of_one(norm, shuffle, world):
    """The whole detector. Where the normalization batch is the total batch, or the RoI itself, shuffling is exact."""
    losses, expected = whole_step(0, norm, False, 1)
    ranks = run_ranks(whole_step, world, norm, shuffle, world)
    for name, value in losses.items():
        assert sum(rank_losses[name] for rank_losses, _ in ranks) / world == pytest.approx(value, rel=1e-10), name
    for _, grads in ranks:
        torch.testing.assert_close(grads, expected, rtol=1e-8, atol=1e-10)


def test_the_heads_have_the_layers_asked_for():
    heads = build("BN").roi_heads
    layers = [
        m for branch in (heads.box_head, heads.mask_head) for m in branch.modules() if isinstance(m, DomainBatchNorm)
    ]
    assert len(layers) == 4 and not any(layer.sync for layer in layers)
    assert all(m.sync for m in build("SyncBN").roi_heads.modules() if isinstance(m, DomainBatchNorm))
