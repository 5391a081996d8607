"""RetinaNet and Mask R-CNN against torchvision's, with the same weights and inputs: a training step and an inference.

Both are R50-FPN with BatchNorm in the backbone and the heads. A step is forward, losses and backward, without the
optimizer; an inference is of one image. The losses are the same function if, as here, all images have the same number
of foreground anchors, and as many anchors and RoIs are sampled as possible. They are compared with the proposals of
torchvision's model in both: rounding decides between boxes with nearly equal scores.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2, retinanet_resnet50_fpn_v2
from torchvision.models.detection.retinanet import RetinaNetHead

import domainnorm as dn

from .table import Row
from .timing import milliseconds, ratio, times

CLASSES = 80
COMMON = "MODEL.BACKBONE.NAME resnet50 MODEL.BACKBONE.NORM BN MODEL.BACKBONE.FREEZE_AT 0 "
# torchvision calls the norms of its head level by level
RETINANET = COMMON + (
    f"MODEL.RETINANET.NUM_CLASSES {CLASSES} MODEL.RETINANET.NORM BN MODEL.RETINANET.POPULATION_STATISTICS shared "
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA 0.0 TEST.DETECTIONS_PER_IMAGE 300"
)
MASK_RCNN = COMMON + (
    f"MODEL.META_ARCHITECTURE GeneralizedRCNN MODEL.MASK_ON True MODEL.ROI_HEADS.NUM_CLASSES {CLASSES} "
    "MODEL.FPN.NORM BN MODEL.RPN.NUM_CONV 2 MODEL.RPN.POST_NMS_TOPK_TRAIN 2000 MODEL.ROI_BOX_HEAD.NUM_CONV 4 "
    "MODEL.ROI_BOX_HEAD.NUM_FC 1 MODEL.ROI_BOX_HEAD.NORM BN MODEL.ROI_MASK_HEAD.NORM BN"
)
DETECTORS = {"RetinaNet": RETINANET, "Mask R-CNN": MASK_RCNN}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, nargs=2, default=[256, 320], help="height and width of the images")
    parser.add_argument("--batch", type=int, default=2, help="number of images in a training step")
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--repeats", type=int, default=7, help="number of ratios, of which the median is taken")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])


def measure(args: argparse.Namespace) -> Iterator[Row]:
    for detector in args.detectors:
        models = build(detector, *args.size, device=args.device)
        images, targets = batch(args.batch, *args.size, device=args.device)
        for precision in args.precisions:
            dtype = PRECISIONS[precision]
            for what, compare, runs in (
                ("training step", compare_losses, steps(models, images, targets, dtype)),
                ("inference", compare_detections, inferences(models, images[:1], dtype)),
            ):
                difference = compare(models, runs)
                taken = times(runs, args.repeats, device=args.device)
                row = {
                    "detector": detector,
                    "what": what,
                    "size": "x".join(map(str, args.size)),
                    "precision": precision,
                    "seconds": sorted(taken["ours"])[args.repeats // 2],
                    "time, ours / torchvision's": ratio(taken, "ours", "theirs"),
                    "relative difference": difference,
                }
                if args.device == "cuda":
                    number = args.batch if what == "training step" else 1
                    for who, key in (("ours", "ours"), ("torchvision's", "theirs")):
                        row[f"images / s, {who}"] = number * 1000 / milliseconds(taken, key)
                else:
                    shares = {who: convolutions_of(run) for who, run in runs.items()}  # both: running statistics move
                    row["convolutions, of ours"] = shares["ours"]
                yield row


def build(detector: str, height: int, width: int, device: str = "cpu") -> dict[str, nn.Module]:
    """Ours and theirs, with the same weights."""
    sizes = f" MODEL.DEVICE {device} INPUT.MIN_SIZE_TEST {min(height, width)} INPUT.MAX_SIZE_TEST {max(height, width)}"
    torch.manual_seed(0)
    ours = dn.build_model(dn.load_config(None, (DETECTORS[detector] + sizes).split()))
    options: dict[str, Any] = {
        **{"weights": None, "weights_backbone": None, "_skip_resize": True},
        **{"min_size": min(height, width), "max_size": max(height, width)},
    }
    if detector == "RetinaNet":
        theirs = retinanet_resnet50_fpn_v2(num_classes=CLASSES, **options)
        theirs.head = RetinaNetHead(256, 9, CLASSES, norm_layer=nn.BatchNorm2d)
    else:
        theirs = maskrcnn_resnet50_fpn_v2(num_classes=CLASSES + 1, **options)
    theirs.load_state_dict(ours.state_dict())
    ours.weights_last = device == "cpu"  # as dn.train has it
    return {"ours": ours, "theirs": theirs.to(device)}


def batch(number: int, height: int, width: int, device: str = "cpu") -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Random images and, in all of them, the same six objects."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([width, height])
    corners = torch.rand(6, 2, generator=generator) * size * 0.6
    boxes = torch.cat([corners, corners + 16 + torch.rand(6, 2, generator=generator) * size * 0.3], 1)
    masks = torch.zeros(6, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left : (left + right) // 2] = 1
    target = {"boxes": boxes, "labels": torch.arange(6), "masks": masks}
    images = [torch.rand(3, height, width, generator=generator).to(device) for _ in range(number)]
    return images, [{key: value.to(device) for key, value in target.items()} for _ in images]


def steps(
    models: dict[str, nn.Module], images: list[Tensor], targets: list[dict[str, Tensor]], dtype: torch.dtype
) -> dict[str, Callable[[], list[Tensor]]]:
    """A training step of each model, which returns its losses."""
    background = [t | {"labels": t["labels"] + 1} for t in targets]  # torchvision's R-CNNs count it as class 0

    def step(name: str) -> list[Tensor]:
        model = models[name].train()
        torch.manual_seed(0)  # of the anchors and RoIs that are sampled
        model.zero_grad()
        own = background if name == "theirs" and "roi_heads" in dict(model.named_children()) else targets
        with torch.autocast(images[0].device.type, dtype=dtype, enabled=dtype != torch.float32):
            losses = model(images, own)
        sum(losses.values()).backward()
        return list(losses.values())

    return {name: lambda name=name: step(name) for name in models}


def inferences(
    models: dict[str, nn.Module], images: list[Tensor], dtype: torch.dtype
) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """An inference of each model, which returns what it finds in the first image."""

    @torch.no_grad()
    def infer(name: str) -> dict[str, Tensor]:
        with torch.autocast(images[0].device.type, dtype=dtype, enabled=dtype != torch.float32):
            return models[name].eval()(images)[0]

    return {name: lambda name=name: infer(name) for name in models}


def compare_losses(models: dict[str, nn.Module], runs: dict[str, Callable[[], list[Tensor]]]) -> float:
    """The largest relative difference of a loss; buffers stay equal, because both models take a step."""
    if not hasattr(models["theirs"], "rpn"):
        return _difference(runs["ours"](), runs["theirs"]())
    kept: list[Any] = []
    choose = models["theirs"].rpn.filter_proposals

    def choose_and_keep(*args: Any) -> Any:
        kept.append(choose(*args))
        return kept[-1]

    with mock.patch.object(models["theirs"].rpn, "filter_proposals", choose_and_keep):
        theirs = runs["theirs"]()
    with mock.patch.object(models["ours"].rpn, "filter_proposals", lambda *_: kept[-1]):
        return _difference(runs["ours"](), theirs)


def compare_detections(models: dict[str, nn.Module], runs: dict[str, Callable[[], dict[str, Tensor]]]) -> float:
    """The largest relative difference of a score, also of those below the threshold: the models are not trained."""
    found = []
    for name in ("ours", "theirs"):
        with mock.patch.object(getattr(models[name], "roi_heads", models[name]), "score_thresh", 0.0):
            found.append(runs[name]()["scores"])
    return _difference(*([scores] for scores in found)) if len(found[0]) == len(found[1]) > 0 else float("inf")


def convolutions_of(run: Callable[[], object]) -> float:
    """The share of the processor's time that convolutions take in a run, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events = profile.key_averages()
    return sum(e.self_cpu_time_total for e in events if "conv" in e.key.lower()) / sum(
        e.self_cpu_time_total for e in events
    )


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(((a - b).abs() / b.abs()).max().item() for a, b in zip(ours, theirs, strict=True))
