"""A data set, a config and a model small enough to train in a test."""

import json
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from PIL import Image
from torch import nn

from domainnorm.config import load_config
from domainnorm.layers import DomainBatchNorm

CATEGORY_IDS = [3, 7]


def write_dataset(folder: Path, count: int = 8, size: int = 64) -> str:
    """`count` images, each a coloured square on grey; returns the name of the data set."""
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        x, side, kind = 4 + 3 * i, 20 + i, i % 2
        image = Image.new("RGB", (size, size), (90, 90, 90))
        image.paste((250, 40, 40) if kind else (40, 40, 250), (x, x, x + side, x + side))
        image.save(folder / "images" / f"{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": size, "width": size})
        box = [x, x, min(side, size - x), min(side, size - x)]
        polygon = [x, x, x + box[2], x, x + box[2], x + box[3], x, x + box[3]]
        annotations.append(
            {
                "id": i,
                "image_id": 10 + i,
                "category_id": CATEGORY_IDS[kind],
                "bbox": box,
                "area": box[2] * box[3],
                "segmentation": [polygon],
            }
        )
    categories = [{"id": k, "name": f"kind {k}"} for k in CATEGORY_IDS]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return f"{folder / 'annotations.json'}:{folder / 'images'}"


def options(data_set: str, output: Path, **others: object) -> list[object]:
    """KEY VALUE pairs for a detector that trains a few steps in a second; `others` as `SOLVER__MAX_ITER=3`."""
    chosen: dict[str, object] = {
        "OUTPUT_DIR": str(output),
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": "mobilenet_v3_small",
        "MODEL.BACKBONE.NORM": "BN",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.FPN.OUT_CHANNELS": 8,
        "MODEL.RETINANET.NORM": "BN",
        "MODEL.RETINANET.NUM_CONVS": 1,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
        "INPUT.MIN_SIZE_TRAIN": [64],
        "INPUT.MAX_SIZE_TRAIN": 64,
        "INPUT.MIN_SIZE_TEST": 64,
        "INPUT.MAX_SIZE_TEST": 64,
        "DATASETS.TRAIN": [data_set],
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_ITER": 4,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "TEST.REPORT": False,
    }
    chosen |= {key.replace("__", "."): value for key, value in others.items()}
    return [word for pair in chosen.items() for word in pair]


def config(data_set: str, output: Path, **others: object) -> CfgNode:
    return load_config(None, options(data_set, output, **others))


# On top of `options`: a Mask R-CNN.
MASK_RCNN: dict[str, object] = {
    "MODEL__META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL__MASK_ON": True,
    "MODEL__BACKBONE__NORM": "GN",
    "MODEL__ANCHOR_GENERATOR__SIZES": [8, 16, 32, 64, 96],
    "MODEL__RETINANET__NORM": "",
    "MODEL__RPN__POST_NMS_TOPK_TRAIN": 40,
    "MODEL__RPN__POST_NMS_TOPK_TEST": 20,
    "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0,
    "MODEL__ROI_BOX_HEAD__NUM_CONV": 1,
    "MODEL__ROI_BOX_HEAD__CONV_DIM": 8,
    "MODEL__ROI_BOX_HEAD__NUM_FC": 1,
    "MODEL__ROI_BOX_HEAD__FC_DIM": 16,
    "MODEL__ROI_BOX_HEAD__NORM": "BN",
    "MODEL__ROI_MASK_HEAD__NUM_CONV": 1,
    "MODEL__ROI_MASK_HEAD__CONV_DIM": 8,
    "MODEL__ROI_MASK_HEAD__NORM": "BN",
}


class Regressor(nn.Module):
    """A detector's interface over a few numbers, in float64: what it says of an image depends on that image only.

    Its loss is the mean over images of a loss of each, so equal shares of a batch average to the batch.
    """

    def __init__(self, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = DomainBatchNorm(3) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(3, 4)
        self.double()

    def forward(self, images, targets=None):
        colours = torch.stack([image.double().mean((1, 2)) for image in images])
        out = self.linear(self.dropout(self.norm(colours)))
        if not self.training:
            boxes = torch.stack([out[:, 0], out[:, 1], out[:, 0] + 20, out[:, 1] + 30], 1)
            return [
                {"boxes": box[None] + 10, "labels": torch.tensor([0]), "scores": score[None].sigmoid()}
                for box, score in zip(boxes, out[:, 2], strict=True)
            ]
        goal = torch.stack([target["boxes"].double().mean(0) / 64 for target in targets])
        loss = (out - goal).square().mean()
        return {"loss_box": loss, "loss_size": 0.1 * out.square().mean()}
