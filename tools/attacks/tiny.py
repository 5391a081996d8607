"""A data set and models so small that they train in a second."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

IMAGE = 64  # pixels


def write_data(model: str, folder: Path, count: int = 8) -> str:
    """A data set of `count` images for one of `MODELS`; returns its name."""
    return (_write_classes if model == "Classifier" else write_boxes)(folder, count)


def _write_classes(folder: Path, count: int) -> str:
    for i in range(count):
        (folder / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (250 * (i % 2), 9 * i, 90)).save(folder / f"{i % 2}" / f"{i}.png")
    return str(folder)


def write_boxes(folder: Path, count: int = 8) -> str:
    """`count` images, each a square on grey, in COCO's format; returns the name of the data set."""
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        x, side = 4 + 3 * i % 30, 20 + i % 10
        image = Image.new("RGB", (IMAGE, IMAGE), (90, 90, 90))
        image.paste((250, 40, 40) if i % 2 else (40, 40, 250), (x, x, x + side, x + side))
        image.save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": IMAGE, "width": IMAGE})
        corners = [x, x, x + side, x, x + side, x + side, x, x + side]
        box = {"bbox": [x, x, side, side], "area": side * side, "segmentation": [corners], "iscrowd": 0}
        annotations.append({"id": i, "image_id": i, "category_id": 1 + i % 2, **box})
    categories = [{"id": 1, "name": "blue"}, {"id": 2, "name": "red"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content), encoding="utf-8")
    return f"{folder / 'annotations.json'}:{folder / 'images'}"


_ALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.NORM": "BN",
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.WARMUP_ITERS": 0,
    "TEST.RECOMPUTE.NUM_SAMPLES": 8,
}
_DETECTOR = _ALL | {
    "MODEL.BACKBONE.NAME": "mobilenet_v3_small",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.ANCHOR_GENERATOR.SIZES": [8, 16, 32, 64, 96],
    "INPUT.MIN_SIZE_TRAIN": [IMAGE],
    "INPUT.MAX_SIZE_TRAIN": IMAGE,
    "INPUT.MIN_SIZE_TEST": IMAGE,
    "INPUT.MAX_SIZE_TEST": IMAGE,
}
MODELS: dict[str, dict[str, Any]] = {  # the options of each
    "RetinaNet": _DETECTOR
    | {"MODEL.RETINANET.NUM_CLASSES": 2, "MODEL.RETINANET.NORM": "BN", "MODEL.RETINANET.NUM_CONVS": 1},
    "GeneralizedRCNN": _DETECTOR
    | {
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.MASK_ON": True,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 40,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
        "MODEL.ROI_HEADS.NUM_CLASSES": 2,
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 1,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": 8,
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        "MODEL.ROI_BOX_HEAD.NORM": "BN",
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    },
    "Classifier": _ALL
    | {
        "MODEL.META_ARCHITECTURE": "Classifier",
        "MODEL.BACKBONE.NAME": "cifar_resnet8",
        "MODEL.CLASSIFIER.NUM_CLASSES": 2,
        "INPUT.CROP_SIZE": 32,
    },
}


def words(options: dict[str, Any]) -> list[Any]:
    """`[KEY, VALUE, …]`, as `load_config` and the command line take them."""
    return [word for pair in options.items() for word in pair]
