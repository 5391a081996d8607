"""Faults of statistics: calls and domains that share them, drift, train/test inconsistency, padding."""

import functools
from typing import Any

import audit_training as training
import torch
from audit_models import PerLevel, Pyramid
from audit_variants import Fault, Given, Variant, norms_of
from torch import Tensor, nn
from torchvision.models import detection, mobilenet_v3_small
from torchvision.models.detection.anchor_utils import AnchorGenerator

import domainnorm as dn

SHIFT = 0.5  # of the second of two sources of images


def shared_calls(v: Variant, planted: bool) -> Given:
    """torch's BatchNorm in a head that is shared over levels, and one for each level."""
    levels = 3 + v.k // 2 % 2
    norm: Any = nn.BatchNorm2d if planted else lambda c: PerLevel(nn.BatchNorm2d(c) for _ in range(levels))
    return _pyramid(v, levels, norm)


def row_3(v: Variant, planted: bool) -> Given:
    """SGD statistics per domain, population statistics shared; and rows 4 and 1 of Table 5."""
    return _rows(v, ("per_domain", "shared") if planted else (("per_domain",) * 2, ("shared",) * 2)[v.k // 2 % 2])


def row_2(v: Variant, planted: bool) -> Given:
    """SGD statistics shared, population statistics per domain; and rows 1 and 4 of Table 5."""
    return _rows(v, ("shared", "per_domain") if planted else (("shared",) * 2, ("per_domain",) * 2)[v.k // 2 % 2])


def _rows(v: Variant, choice: tuple[str, str]) -> Given:
    levels = 3 + v.k // 2 % 2
    options = dict(zip(("sgd_statistics", "population_statistics"), choice, strict=True))
    return _pyramid(v, levels, lambda c: dn.DomainBatchNorm(c, num_domains=levels, **options))  # type: ignore[arg-type]


def _pyramid(v: Variant, levels: int, norm: Any) -> Given:
    model = Pyramid(levels, norm, v.width)
    training.train(model, training.classify(v.batch, 16), 120)
    return Given(model, training.batches(8, v.batch, 16), layers=("norms.0", "norms.1"))


def named_sets(v: Variant, planted: bool) -> Given:
    """Two sets of images in one BatchNorm, given by their names; alike, or with a BatchNorm for each."""
    if planted or v.k // 2 % 2:
        model = v.train(v.model(), source=_alternating if planted else _one)
        return Given(model, {"day": v.batches(4), "night": v.batches(4, SHIFT if planted else 0.0)})
    model = v.model(functools.partial(dn.DomainBatchNorm, num_domains=2))
    return Given(
        training.train(model, _by_domain(v), 160),
        {name: [(x, k) for x in v.batches(4, k * SHIFT)] for k, name in enumerate(("day", "night"))},
        {"forward": _with_domain},
    )


def alternating(v: Variant, planted: bool) -> Given:
    """Batches of one set and of another by turns, and batches that mix both."""
    if planted:
        model = v.train(v.model(), source=_alternating)
        return Given(model, [x for _ in range(4) for shift in (0.0, SHIFT) for x in v.batches(1, shift)])
    model = training.train(v.model(), _mixed(v), 120)
    return Given(model, [_both(v)[0] for _ in range(8)])


def far_domain(v: Variant, planted: bool) -> Given:
    """Images like none that the model has a domain for, and images of its first one."""
    model = v.model(functools.partial(dn.DomainBatchNorm, num_domains=2))
    training.train(model, _by_domain(v), 160)
    return Given(model, [(x, 0) for x in v.batches(8, -1.5 if planted else 0.0)], {"forward": _with_domain})


def needless_domains(v: Variant, planted: bool) -> Given:
    """Separate statistics of domains that are one, and of two."""
    model = v.model(functools.partial(dn.DomainBatchNorm, num_domains=2))
    shift = 0.0 if planted else SHIFT
    training.train(model, _by_domain(v, shift), 160)
    batches = [(x, k) for _ in range(16) for k in (0, 1) for x in v.batches(1, k * shift)]
    return Given(model, batches, {"forward": _with_domain})


def _one(step: int) -> float:
    return 0.0


def _alternating(step: int) -> float:
    return SHIFT * (step % 2)


def _both(v: Variant) -> tuple[Tensor, Tensor]:
    """A batch, half of it from each source, in random order."""
    one, other = training.images(v.batch // 2, v.size), training.images(v.batch // 2, v.size, SHIFT)
    order = torch.randperm(2 * (v.batch // 2))
    return torch.cat([one[0], other[0]])[order], torch.cat([one[1], other[1]])[order]


def _mixed(v: Variant) -> Any:
    while True:
        x, labels = _both(v)
        yield lambda model, x=x, labels=labels: nn.functional.cross_entropy(model(x), labels)


def _with_domain(model: nn.Module, batch: tuple[Tensor, int]) -> Tensor:
    x, domain = batch
    with dn.use_domain(model, domain):
        return model(x)


def _by_domain(v: Variant, shift: float = SHIFT) -> Any:
    step = 0
    while True:
        x, labels = training.images(v.batch, v.size, shift * (step % 2))
        yield lambda model, x=x, labels=labels, k=step % 2: nn.functional.cross_entropy(
            _with_domain(model, (x, k)), labels
        )
        step += 1


def one_layer_drifts(v: Variant, planted: bool) -> Given:
    """Running statistics of one layer that are off: a mean by some deviations, or a variance; and as trained."""
    model = v.trained()
    name, layer = norms_of(model)[(1, -1)[v.k % 2]]
    if planted:
        if v.k % 3:
            layer.running_mean += (0.8 + 0.1 * v.k) * layer.running_var.sqrt()  # type: ignore[operator, union-attr]
        else:
            layer.running_var *= 3 + v.k  # type: ignore[operator]
    return Given(model, v.batches(), layers=(name,))


def other_images(v: Variant, planted: bool) -> Given:
    """Images darker than those of training; and few of the same."""
    return Given(v.trained(), v.batches(8, -SHIFT) if planted else v.batches(2))


def recomputed(v: Variant, planted: bool) -> Given:
    """The same, and statistics recomputed from such images."""
    model = v.trained()
    if not planted:
        dn.recompute_population_statistics(model, v.batches(32, -SHIFT), progress=False)
    return Given(model, v.batches(8, -SHIFT))


def frozen_misfit(v: Variant, planted: bool) -> Given:
    """Constants that belong to other weights, and those of these weights."""
    model = v.trained()
    if planted:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.copy_(3 * torch.randn_like(module.weight) * module.weight.std())
    return Given(dn.freeze_batchnorm(model), v.batches())


def inconsistent(v: Variant, planted: bool) -> Given:
    """Running variances all too small by a factor, and recomputed ones."""
    model = v.trained()
    if planted:
        for _, layer in norms_of(model):
            layer.running_var /= 3  # type: ignore[operator]
    return Given(model, v.batches())


def padded(v: Variant, planted: bool) -> Given:
    """A detector whose images of a batch have other shapes, and of one shape."""
    model = _detector(v)
    shapes = [(64, 32), (32, 64)] if planted else [(64, 32)]
    model.train()
    with torch.no_grad():
        for _ in range(200):
            model.backbone(model.transform(_shapes(v, shapes))[0].tensors)  # type: ignore[operator]
    return Given(model, [_shapes(v, shapes) for _ in range(8)])


def _shapes(v: Variant, shapes: list[tuple[int, int]]) -> list[Tensor]:
    return [
        0.5 + 0.2 * training.images(1, 64)[0][0, :, : (s := shapes[k % len(shapes)])[0], : s[1]] for k in range(v.batch)
    ]


def _detector(v: Variant) -> nn.Module:
    backbone: Any = nn.Sequential(*list(mobilenet_v3_small(weights=None).features)[: 4 + v.k // 2])
    for _, layer in norms_of(backbone):
        layer.momentum = 0.1
    backbone.out_channels = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)][-1].out_channels
    anchors = AnchorGenerator(((16, 32),), ((1.0,),))
    return detection.RetinaNet(
        backbone, 3, min_size=32, max_size=64, anchor_generator=anchors, score_thresh=0.0, detections_per_img=10
    )


FAULTS = {
    "BatchNorm in a shared head": Fault("calls", "shared statistics", shared_calls, "calls"),
    "Table 5, row 3": Fault("calls", "shared statistics", row_3, "calls"),
    "Table 5, row 2": Fault("calls", "shared batches", row_2, "calls"),
    "two named data sets in one BatchNorm": Fault("domains", "one set of statistics", named_sets, "domains"),
    "batches of two data sets by turns": Fault("domains", "batches of different sources", alternating, "mixed_batches"),
    "an input domain far from all": Fault("domains", "far from all", far_domain, "far_domain"),
    "domains that need not be separate": Fault(
        "domains", "separate where shared would do", needless_domains, "separate"
    ),
    "one layer's running statistics are off": Fault("drift", "statistics lag", one_layer_drifts, "drift"),
    "images of another kind": Fault("drift", "statistics lag", other_images, "drift"),
    "images of another kind, recomputed": Fault("drift", "statistics lag", recomputed, "drift"),
    "frozen statistics of other weights": Fault("drift", "frozen statistics do not fit", frozen_misfit, "frozen_drift"),
    "minibatch and population statistics disagree": Fault(
        "consistency", "train/test inconsistency", inconsistent, "consistency", first=False
    ),
    "padding": Fault("padding", "padding counts", padded, "padding"),
}
