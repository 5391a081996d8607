"""The detector: torchvision's RetinaNet with a head whose levels are domains."""

import copy

import pytest
import torch
from ranks import Counted, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection.retinanet import RetinaNetHead as TorchvisionHead
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

import domainnorm as dn
from domainnorm.distributed import ALL_GATHER
from domainnorm.layers import DomainBatchNorm
from domainnorm.modeling import RetinaNetHead, build_model

C, CLASSES, LEVELS = 8, 3, 5
TABLE_5 = {
    1: ("shared", "shared", "shared"),
    2: ("shared", "per_domain", "shared"),
    3: ("per_domain", "shared", "shared"),
    4: ("per_domain", "per_domain", "shared"),
    5: ("per_domain", "shared", "per_domain"),
    6: ("per_domain", "per_domain", "per_domain"),
}
TINY = [
    *("MODEL.BACKBONE.NAME", "resnet18", "MODEL.BACKBONE.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.FPN.OUT_CHANNELS", 8, "MODEL.RETINANET.NUM_CLASSES", CLASSES, "MODEL.RETINANET.NUM_CONVS", 2),
    *("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128, "MODEL.ANCHOR_GENERATOR.SIZES", "[8, 16, 32, 48, 64]"),
    *("MODEL.DEVICE", "cpu"),
]


def tiny(*overrides):
    return build_model(dn.load_config(None, [*TINY, *overrides]))


def features(n=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, C, 16 >> k, 24 >> k, generator=generator, dtype=dtype) for k in range(LEVELS - 1)] + [
        torch.randn(n, C, 1, 2, generator=generator, dtype=dtype)
    ]


def images_and_targets(n=3, seed=0, size=(64, 96), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=generator, dtype=dtype) for _ in range(n)]
    targets = []
    for i in range(n):
        count = i % 3  # one image in three has no object
        corner = torch.rand(count, 2, generator=generator, dtype=dtype) * 30
        boxes = torch.cat([corner, corner + 10 + torch.rand(count, 2, generator=generator, dtype=dtype) * 20], 1)
        targets.append({"boxes": boxes, "labels": torch.randint(0, CLASSES, (count,), generator=generator)})
    return images, targets


def test_forward_hooks_of_norms_in_the_head_are_called():
    head = RetinaNetHead(C, 9, CLASSES, norm="BN").double()
    norms = {name: layer for name, layer in head.named_modules() if isinstance(layer, DomainBatchNorm)}
    seen = []
    for name, layer in norms.items():
        layer.register_forward_hook(lambda _, given, out, name=name: seen.append((name, len(given[0]), len(out))))
    for training in (True, False):
        seen.clear()
        head.train(training)(features())
        assert sorted(seen) == sorted((name, LEVELS, LEVELS) for name in norms)


def test_without_norm_and_with_group_norm_the_head_is_torchvisions():
    for norm, norm_layer in (("", None), ("GN", lambda c: nn.GroupNorm(8, c))):
        ours = RetinaNetHead(C, 9, CLASSES, norm=norm).double()
        theirs = TorchvisionHead(C, 9, CLASSES, norm_layer=norm_layer).double()
        theirs.load_state_dict(ours.state_dict())
        for key, value in theirs(features()).items():
            torch.testing.assert_close(ours(features())[key], value, atol=1e-12, rtol=0)


@pytest.mark.parametrize("row", TABLE_5)
def test_each_row_of_table_5_by_config_keys_alone(row):
    sgd, population, affine = TABLE_5[row]
    prefix = "MODEL.RETINANET."
    keys = ("NORM", "BN", "SGD_STATISTICS", sgd, "POPULATION_STATISTICS", population, "AFFINE", affine)
    model = tiny(*(prefix + k if i % 2 == 0 else k for i, k in enumerate(keys)))
    norms = [m for m in model.head.modules() if isinstance(m, DomainBatchNorm)]
    assert len(norms) == 4  # two towers of two convolutions, shared by all levels
    for norm in norms:
        assert (norm.num_domains, norm.sgd_statistics, norm.population_statistics, norm.affine) == (
            LEVELS,
            *TABLE_5[row],
        )
    losses = model.train()(*images_and_targets())
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all((norm.num_batches_tracked == (LEVELS if row in (3, 5) else 1)).all() for norm in norms)
    with torch.no_grad():
        detections = model.eval()(images_and_targets()[0])
    assert len(detections) == 3 and set(detections[0]) == {"boxes", "scores", "labels"}


def test_row_4_is_separate_batch_norms_per_level():
    """An unrolled head: torch's own BatchNorm for every level, the same convolutions."""
    head = RetinaNetHead(C, 9, CLASSES, norm="BN").double()
    separate = copy.deepcopy(head)
    outputs = {}
    for name, tower, last in (
        ("cls_logits", separate.classification_head, separate.classification_head.cls_logits),
        ("bbox_regression", separate.regression_head, separate.regression_head.bbox_reg),
    ):
        norms = [[nn.BatchNorm2d(C, dtype=torch.float64) for _ in tower.conv] for _ in range(LEVELS)]
        levels = []
        for x, own in zip(features(), norms, strict=True):
            for block, norm in zip(tower.conv, own, strict=True):
                x = norm(block[0](x)).relu()
            y = last(x)
            columns = CLASSES if name == "cls_logits" else 4
            levels.append(y.view(2, 9, columns, *y.shape[2:]).permute(0, 3, 4, 1, 2).reshape(2, -1, columns))
        outputs[name] = torch.cat(levels, 1)
        ours = head.classification_head if name == "cls_logits" else head.regression_head
        head.train()(features()) if name == "cls_logits" else None
        for depth, block in enumerate(ours.conv):
            means = torch.stack([norms[k][depth].running_mean for k in range(LEVELS)])
            torch.testing.assert_close(block[1].running_mean, means, atol=1e-10, rtol=0)
    for key, value in outputs.items():
        torch.testing.assert_close(head.train()(features())[key], value, atol=1e-10, rtol=0)


def count_collectives(rank, norm_domains="level"):
    head = RetinaNetHead(C, 9, CLASSES, norm="SyncBN", norm_domains=norm_domains, num_datasets=2).double()
    levels = [x.requires_grad_() for x in features(seed=rank)]
    if norm_domains != "level":  # each rank has images of one data set only
        dn.use_domain(head, torch.full((len(levels[0]),), rank))
    with Counted() as forward:
        outputs = head(levels)
    with Counted() as backward:
        sum(y.square().sum() for y in outputs.values()).backward()
    return list(forward), list(backward)


@pytest.mark.parametrize("domains", ["level", "dataset", "level_and_dataset"])
def test_two_towers_of_four_layers_over_five_levels_need_4_and_4_collectives(domains):
    for forward, backward in run_ranks(count_collectives, 2, domains):
        assert forward == [ALL_GATHER] * 4 and backward == ["all_reduce"] * 4


@pytest.mark.parametrize("statistics", ["population", "minibatch"])
def test_a_prediction_depends_on_its_own_image_only(statistics):
    model = tiny("MODEL.RETINANET.NORM", "BN", "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
    model.train()(*images_and_targets())
    dn.set_statistics(model.eval(), statistics)
    images = images_and_targets()[0] + images_and_targets(1, seed=5, size=(96, 64))[0]
    with torch.no_grad():
        together, alone, reversed_ = model(images), [model([i])[0] for i in images], model(images[::-1])[::-1]
    for a, b, c in zip(together, alone, reversed_, strict=True):
        assert len(a["boxes"]) > 0
        for key in a:
            assert torch.equal(a[key], b[key]) and torch.equal(a[key], c[key])


def test_under_minibatch_statistics_the_head_alone_keeps_images_apart():
    head = RetinaNetHead(C, 9, CLASSES, norm="BN").double().eval()
    dn.set_statistics(head, "minibatch")
    together = head(features(3))
    for i in range(3):
        alone = head([f[i : i + 1] for f in features(3)])
        for key in together:
            torch.testing.assert_close(together[key][i : i + 1], alone[key], atol=1e-12, rtol=0)


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou"])
def test_losses_are_divided_by_the_foreground_of_the_whole_batch(box_loss):
    model = tiny("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", box_loss).train()
    images, targets = images_and_targets()
    batch, _ = model.transform(images, targets)
    levels = list(model.backbone(batch.tensors).values())
    outputs, anchors = model.head(levels), model.anchor_generator(batch, levels)
    losses = model.compute_loss(targets, outputs, anchors)
    cls = box = torch.tensor(0.0)
    count = 0
    for i, target in enumerate(targets):  # one image, one anchor class at a time
        if len(target["boxes"]):
            from torchvision.ops import box_iou

            matched = model.proposal_matcher(box_iou(target["boxes"], anchors[i]))
        else:
            matched = torch.full((len(anchors[i]),), -1)
        one_hot = torch.zeros_like(outputs["cls_logits"][i])
        for anchor in (matched >= 0).nonzero().flatten().tolist():
            one_hot[anchor, target["labels"][matched[anchor]]] = 1
            count += 1
            gt = target["boxes"][matched[anchor]][None]
            delta, at = outputs["bbox_regression"][i, anchor][None], anchors[i][anchor][None]
            if box_loss == "giou":
                box = box + generalized_box_iou_loss(model.box_coder.decode_single(delta, at), gt).sum()
            else:
                error = delta - model.box_coder.encode_single(gt, at)
                box = box + nn.functional.smooth_l1_loss(error, torch.zeros_like(error), beta=0.1, reduction="sum")
        keep = matched != -2
        cls = cls + sigmoid_focal_loss(outputs["cls_logits"][i][keep], one_hot[keep], reduction="sum")
    assert count > 3
    torch.testing.assert_close(losses["loss_cls"], cls / count)
    torch.testing.assert_close(losses["loss_box_reg"], box / count)


def test_a_batch_without_objects_has_finite_losses_and_gradients_everywhere():
    model = tiny("MODEL.RETINANET.NORM", "BN").train()
    images, _ = images_and_targets(2)
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}] * 2
    losses = model(images, empty)
    sum(losses.values()).backward()
    assert losses["loss_box_reg"] == 0 and losses["loss_cls"].isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def synchronized_step(rank, world):
    """One step of the whole detector on this rank's images, gradients averaged by DDP."""
    torch.manual_seed(0)
    model = tiny(*SYNC).double().train()
    network = DistributedDataParallel(model) if world > 1 else model
    images, targets = images_and_targets(6, dtype=torch.float64)
    sizes = [6] if world == 1 else [4, 2]  # uneven
    first = sum(sizes[:rank])
    part = slice(first, first + sizes[rank])
    losses = network(images[part], targets[part])
    sum(losses.values()).backward()
    return {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


SYNC = ["MODEL.BACKBONE.NORM", "SyncBN", "MODEL.RETINANET.NORM", "SyncBN", "MODEL.RETINANET.SGD_STATISTICS", "shared"]


@pytest.mark.slow
def test_two_ranks_with_uneven_images_take_the_step_of_one():
    gradients, buffers = synchronized_step(0, 1)
    for got_gradients, got_buffers in run_ranks(synchronized_step, 2, 2):
        for name, value in gradients.items():
            torch.testing.assert_close(
                got_gradients[name], value, atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )
        for name, value in buffers.items():
            torch.testing.assert_close(got_buffers[name], value, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v3_large", "mobilenet_v3_small"])
@pytest.mark.parametrize("norm", ["", "BN", "SyncBN", "GN", "FrozenBN"])
def test_backbones(name, norm):
    model = tiny("MODEL.BACKBONE.NAME", name, "MODEL.BACKBONE.NORM", norm, "MODEL.FPN.NORM", norm)
    x = torch.rand(1, 3, 256, 128)
    shapes = [tuple(f.shape) for f in model.eval().backbone(x).values()]
    assert shapes == [(1, 8, 256 // s, 128 // s) for s in (8, 16, 32, 64, 128)]
    assert not any(type(m).__module__.startswith("torch.") for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(("name", "stage2"), [("resnet18", "layer1"), ("mobilenet_v3_large", "2")])
def test_freeze_at(name, stage2):
    """2: the stem and the first stage; constant weights and constant norms."""
    model = tiny("MODEL.BACKBONE.NAME", name, "MODEL.BACKBONE.FREEZE_AT", 2).train()
    frozen = {n for n, p in model.backbone.body.named_parameters() if not p.requires_grad}
    assert frozen and any(n.startswith(stage2 + ".") for n in frozen)
    assert not any(n.startswith(("layer2", "layer3", "4.", "5.")) for n in frozen)
    before = copy.deepcopy(dict(model.named_buffers()))
    losses = model(*images_and_targets())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    changed = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert changed and not any(n.startswith((f"backbone.body.{stage2}.", "backbone.body.bn1")) for n in changed)


def test_backbone_weights_from_a_torchvision_file(tmp_path):
    import torchvision

    for name in ("resnet18", "mobilenet_v3_large"):
        plain = getattr(torchvision.models, name)(weights=None)
        torch.save(plain.state_dict(), tmp_path / "weights.pth")
        model = tiny("MODEL.BACKBONE.NAME", name, "MODEL.WEIGHTS", str(tmp_path / "weights.pth")).eval()
        x = torch.rand(2, 3, 64, 64)
        body = plain.eval().features if name.startswith("mobilenet") else nn.Sequential(*list(plain.children())[:-2])
        expected = body.eval()(x)
        torch.testing.assert_close(list(model.backbone.body(x).values())[-1], expected)


def test_weights_by_unknown_name_or_file():
    for weights, message in (
        ("ResNet18_Weights.NOPE", "torchvision knows no such weights"),
        ("/nowhere/model.pth", "/nowhere/model.pth: no such file"),
    ):
        with pytest.raises(dn.UserError, match=message):
            tiny("MODEL.WEIGHTS", weights)


def test_group_norm_in_inference_where_a_level_is_one_pixel():
    model = tiny("MODEL.RETINANET.NORM", "GN", "MODEL.FPN.NORM", "GN").eval()
    assert len(model(images_and_targets(1, size=(64, 64))[0])) == 1


@pytest.mark.slow
def test_a_bfloat16_step():
    model = tiny("MODEL.RETINANET.NORM", "BN").train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*images_and_targets(size=(128, 128)))  # P6 of 1 x 1: torch's own gradient is at fault on CPUs
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(b.dtype != torch.bfloat16 for b in model.buffers())
