"""A detector in ONNX, from an image to its final boxes, checked against the model that it is made of.

By the exporter that traces (`torch.onnx.export(dynamo=False)`), for which torchvision's detectors are written: that of
`torch.export` cannot follow sizes that depend on numbers, such as those of what is left by a threshold or by NMS.
"""

import io
import json
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

OPSET = 17
FEW = 20  # detections in all images of the check, at least


@torch.no_grad()
def export_boxes(model: Any, description: dict[str, Any]) -> tuple[bytes, float, list[tuple[int, int, int]]]:
    """The file of a `modeling.detections.Detections` on a CPU, the largest difference, and (N, H, W) of the check.

    A detection differs by its score and by its box, in image sides, from the one of its class that is most like it,
    and by the mean difference of the mask. Where the images of the check hold too little for the model's threshold, a
    file with a lower one is checked too.
    """
    short = model.short_side
    shapes = [(short, short * 5 // 4), (short * 3 // 2, short), (short // 2 + 7, short + 13)]
    random = torch.Generator().manual_seed(0)
    images = [F.interpolate(torch.rand(1, 3, 9, 9, generator=random), shape, mode="bicubic") for shape in shapes]
    images = [image.clamp(0, 1) for image in images]
    own = model.detector.score_thresh
    difference = 0.0
    for threshold in sorted({_low_threshold(model, images, own), own}):
        model.detector.score_thresh = threshold
        content = _traced(model, images[0])
        run = _runner(content)
        difference = max(difference, *(_difference(model(image), run(image), max(image.shape)) for image in images))
    return with_metadata(content, description), difference, [(1, *shape) for shape in shapes]


def with_metadata(content: bytes, description: dict[str, Any]) -> bytes:
    """An ONNX file with the entries of `description`, as JSON but for texts."""
    import onnx

    proto = onnx.load_from_string(content)
    add_metadata(proto, description)
    return proto.SerializeToString()


def add_metadata(proto: Any, description: dict[str, Any]) -> None:
    """The entries of `description` in a model of ONNX, as JSON but for texts."""
    for key, value in description.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))


def _traced(model: Any, image: Tensor) -> bytes:
    stream: Any = io.BytesIO()
    axes = {"images": {2: "H", 3: "W"}, **{name: {0: "n"} for name in model.names}}
    if "masks" in axes:
        axes["masks"] = {0: "n", 1: "H", 2: "W"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself and about what it takes for constants
        torch.onnx.export(
            model,
            (image,),
            stream,
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=model.names,
            dynamic_axes=axes,
        )
    return stream.getvalue()


def _runner(content: bytes) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda image: [torch.as_tensor(value) for value in session.run(None, {"images": image.numpy()})]


def _low_threshold(model: Any, images: Sequence[Tensor], own: float) -> float:
    """`own`, or a lower threshold at which a few objects are found in `images`."""
    model.detector.score_thresh = 0.0
    scores = torch.cat([model(image)[1] for image in images]).sort(descending=True).values
    if len(scores) <= FEW:
        return 0.0
    return min(own, float(scores[FEW - 1 : FEW + 1].mean()))  # between two, as rounding decides about equals


def _difference(own: Sequence[Tensor], other: Sequence[Tensor], side: int) -> float:
    """The difference of the detections in one image; infinite if only one of the two has any."""
    if not len(own[1]) or not len(other[1]):
        return 0.0 if len(own[1]) == len(other[1]) else float("inf")
    rows = [
        torch.cat([boxes / side, scores[:, None], labels[:, None]], 1) for boxes, scores, labels in (own[:3], other[:3])
    ]
    apart = torch.cdist(rows[0], rows[1], p=float("inf"))
    nearest = apart.min(1)
    found = [nearest.values.max(), apart.min(0).values.max()]
    if len(own) > 3:
        found.append((own[3] - other[3][nearest.indices]).abs().mean((1, 2)).max())
    return float(torch.stack(found).max())
