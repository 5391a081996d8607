#!/usr/bin/env python
"""torchvision's RetinaNet in a plain loop: a row of the study `peers`.

    tools/studies/peer_torchvision.py --data FOLDER [--plain] [--steps 800] [--seed 0] --out FOLDER

Its layers and losses are torchvision's defaults (BatchNorm in the ResNet-18, none in pyramid and head). The sizes of
images and anchors, the pyramid's channels, the optimizer, learning rates and steps are those of
`configs/coco_folder.yaml`.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.io import ImageReadMode, decode_image
from torchvision.models import resnet18
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import box_convert
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.functional import hflip

RATE, DECAY, WARMUP, CLIP = 1e-3, 0.05, 100, 1.0
CHANNELS = 64
ANCHORS = tuple(tuple(side * 2 ** (k / 3) for k in range(3)) for side in (16, 32, 64, 128, 192))


class Images(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images in [0, 1] and their targets, labels from 0; with `flips`, half of them mirrored."""

    def __init__(self, data: Path, flips: bool) -> None:
        truth = peers.read(data, "train", peers.LABORATORIES[0])
        labels = {category["id"]: k for k, category in enumerate(truth["categories"])}
        self.flips = flips
        self.num_classes = len(labels)
        self.entries = []
        for image in truth["images"]:
            own = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
            boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float32).reshape(-1, 4)
            target = {
                "boxes": box_convert(boxes, "xywh", "xyxy"),
                "labels": torch.tensor([labels[a["category_id"]] for a in own], dtype=torch.int64),
            }
            self.entries.append((data / "images" / image["file_name"], target))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        file, target = self.entries[index]
        image = read_image(file)
        if self.flips and torch.rand(()) < 0.5:
            x0, y0, x1, y1 = target["boxes"].unbind(1)
            width = image.shape[-1]
            return hflip(image), target | {"boxes": torch.stack([width - x1, y0, width - x0, y1], 1)}
        return image, target


def read_image(file: Path) -> Tensor:
    return decode_image(str(file), ImageReadMode.RGB) / 255


def build(num_classes: int, sizes: tuple[int, ...]) -> RetinaNet:
    """Levels P3 to P7, from random weights."""
    body = resnet18(weights=None)
    layers = {f"layer{k + 2}": str(k) for k in range(3)}
    levels = LastLevelP6P7(CHANNELS, CHANNELS)
    return RetinaNet(
        BackboneWithFPN(body, layers, [128, 256, 512], CHANNELS, levels),
        num_classes,
        min_size=sizes,
        max_size=480,
        anchor_generator=AnchorGenerator(ANCHORS, ((0.5, 1.0, 2.0),) * len(ANCHORS)),
        detections_per_img=100,
    )


def train(model: nn.Module, images: Images, steps: int) -> None:
    """AdamW, a linear warm-up, a cosine to 0."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    spared = {id(p) for m in norms for p in m.parameters()}
    spared |= {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in spared], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if id(p) in spared], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    sampler = RandomSampler(images, num_samples=steps * peers.BATCH)
    loader: Any = DataLoader(images, peers.BATCH, sampler=sampler, collate_fn=lambda batch: tuple(zip(*batch)))  # noqa: B905
    model.train()
    for step, (pixels, targets) in enumerate(loader):
        loss = sum(model(list(pixels), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step}/{steps}, loss {loss.item():.3f}, {time.process_time():.0f} CPU seconds", flush=True)


def main() -> None:
    parser = peers.parser(__doc__)
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    began = time.process_time()
    images = Images(args.data, flips=not args.plain)
    model = build(images.num_classes, (peers.SIZE,) if args.plain else (224, 256, 288))
    train(model, images, args.steps)
    seconds = time.process_time() - began
    model.eval()
    model.transform.min_size = (peers.SIZE,)

    @torch.no_grad()
    def find(files: list[Path]) -> Iterator[peers.Found]:
        for file in files:
            (found,) = model([read_image(file)])
            yield tuple(found[key].tolist() for key in ("boxes", "scores", "labels"))

    peers.finish(args.out, peers.scores(args.data, find), seconds)


if __name__ == "__main__":
    main()
