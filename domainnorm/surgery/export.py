"""A trained model as one file that runs without this library, checked against the model that it is made of."""

import copy
import importlib.util
import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..errors import UserError
from ..layers import DomainBatchNorm
from ..output import replace_file
from ..paths import user_path
from ..statistics.choose import set_statistics
from .domains import with_domains
from .export_boxes import add_metadata, export_boxes
from .fuse import fuse
from .resize_domains import keep_domain

FORMATS = ("torch", "onnx")
DESCRIPTION = "description.json"  # in a file of torch.export, as torch.export.load(extra_files=...) names it
Sizes = list[tuple[int, int, int]]  # of batches of images: (N, H, W)


@dataclass(frozen=True)
class Exported:
    """What `export_model` wrote.

    Attributes:
        images: the shape of the images that the file takes, with names such as "N" for sizes that may vary.
        difference: the largest difference from the model, over batches of the sizes `checked`; for an output with
            numbers above 1, relative to its largest.
        checked: (N, H, W).
    """

    images: tuple[int | str, ...]
    difference: float
    checked: Sizes


def export_model(
    model: nn.Module,
    file: str | Path,
    format: str = "torch",
    *,
    size: tuple[int, int] = (224, 224),
    domain: int | str | None = None,
    statistics: str = "population",
    fused: bool = False,
    boxes: bool = False,
    atol: float | None = None,
) -> Exported:
    """Write `model`, as it predicts in eval mode, to `file`; the model itself is not changed.

    A classifier (or any module) takes images `(N, 3, H, W)`, this library's in [0, 1], and returns logits
    `(N, classes)`. N may vary, and so may H and W if the model can be exported that way; otherwise they are those of
    `size`. A `RetinaNet` takes images in [0, 1] whose sides are multiples of 32 from 160 on, and returns what
    `DenseRetinaNet` does: resizing, box decoding (`torchvision.models.detection._utils.BoxCoder`) and NMS are left to
    the caller. Under minibatch statistics, where a prediction depends on its own image only, N is 1.

    A model of `build_model` has a `description`: class and domain names, image sizes, mean and standard deviation of
    pixels, versions. In ONNX its entries are metadata (`session.get_modelmeta().custom_metadata_map`, as JSON except
    for strings); for torch, `torch.export.load(file, extra_files={"description.json": ""})` reads it.

    With `boxes`, a detector becomes an ONNX file that takes one image `(1, 3, H, W)` of any size, in [0, 1], and
    returns what the model does: resizing, sigmoid, top-k, decoding and NMS are included. Outputs are `boxes` (n, 4),
    XYXY in pixels of the image, `scores` and `labels` (n,) and, for a Mask R-CNN, `masks` (n, H, W), probabilities. N
    is 1: the images of a batch would share their padding, and would need the same number of detections. The tracing
    exporter is used, `torch.onnx.export(dynamo=False)`, which does not support minibatch statistics.

    The file is loaded again and compared with the model on random images of several sizes and batch sizes. Only then
    does it replace `file`.

    Args:
        model: any module; of this library's detectors, a `RetinaNet`, or any with `boxes`.
        file: the file to write.
        format: `"torch"`, for `torch.export.load`, on the model's device; or `"onnx"`.
        size: H and W of the images that are used for tracing.
        domain: if data sets are the domains of norms: the number or name of the only one that the file predicts for.
        statistics: which normalize: `"population"` or `"minibatch"`.
        fused: whether norms are first folded into convolutions, by `dn.fuse`.
        boxes: whether the file returns a detector's final boxes.
        atol: the largest difference allowed; see `Exported`. None: 1e-5, with `boxes` 1e-4.

    Returns:
        What was exported, and how far it differs from the model.

    Raises:
        UserError: the model cannot be exported this way, packages are missing, or the outputs differ; `file` is
            unchanged.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), dn.DomainBatchNorm(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> exported = dn.export_model(model, "model.pt2", size=(32, 32))  # doctest: +SKIP
    """
    file = user_path(file)
    if format not in FORMATS:
        raise UserError(f"format takes one of {list(FORMATS)}, got {format!r}")
    if boxes and (format != "onnx" or not hasattr(model, "for_boxes")):
        what = f"format {format!r}" if format != "onnx" else type(model).__name__
        raise UserError(f"boxes: expected a detector of build_model and format 'onnx', got {what}")
    if boxes and statistics == "minibatch":
        raise UserError("boxes: minibatch statistics cannot be traced: export population statistics, or without boxes")
    if format == "onnx":
        _check_onnx()
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK) or file.is_dir():
        raise UserError(f"{file}: cannot be written: expected a file in a folder that exists and may be written to")
    description = getattr(model, "description", {})
    if (reason := getattr(model, "not_exportable", "")) and not boxes:
        raise UserError(reason)
    model = _prepared(model, domain, statistics, fused)
    content, exported = _with_boxes(model, description) if boxes else _of_fixed_shapes(model, format, size, description)
    limit = (1e-4 if boxes else 1e-5) if atol is None else atol
    if not exported.difference <= limit:
        raise UserError(
            f"{file}: not written, because its outputs would differ from the model's by {exported.difference:.1e}, "
            f"more than atol={limit:.1e}"
        )
    try:
        with replace_file(file, "wb") as stream:
            stream.write(content)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error
    return exported


def _with_boxes(model: nn.Module, description: dict[str, Any]) -> tuple[bytes, Exported]:
    detections: Any = model.cpu().for_boxes()  # type: ignore[operator]
    try:
        content, difference, sizes = export_boxes(detections.eval(), description)
    except Exception as error:  # of many kinds: the exporter runs all of the model's code
        raise _refused("onnx", error) from error
    return content, Exported((1, 3, "H", "W"), difference, sizes)


def _refused(format: str, error: Exception) -> UserError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(f"{format} cannot export the model: {lines[0]}")


def _of_fixed_shapes(
    model: nn.Module, format: str, size: tuple[int, int], description: dict[str, Any]
) -> tuple[bytes, Exported]:
    """A model whose outputs have shapes that depend on those of the images only."""
    if hasattr(model, "for_export"):
        model = model.for_export()  # type: ignore[operator]
    choices = _dynamic(model, size)
    if format == "onnx":
        model = model.cpu()
    height, width = size
    for dims in choices:
        sizes = [(n, height, width) for n in ((2, 1, 3) if 0 in dims else (1,))]
        if 2 in dims:
            stride = getattr(model, "stride", 32)
            sizes += [(1, height + stride, width), (sizes[-1][0], height, width + 2 * stride)]
        try:
            content, difference = _attempt(model, format, dims, sizes, description)
            break
        except Exception as error:  # of many kinds: torch.export runs all of the model's code
            failure = error
    else:
        raise _refused(format, failure) from failure
    sides = [f"{model.stride}·{name}" if hasattr(model, "stride") else name for name in "HW"]
    shape = ("N" if 0 in dims else 1, 3, *(sides if 2 in dims else size))
    return content, Exported(shape, difference, sizes)


def _dynamic(model: nn.Module, size: tuple[int, int]) -> list[dict[int, Any]]:
    """Which dimensions of the images may be of any size: all that one wishes for, then fewer."""
    per_image = any(m.uses_minibatch for m in model.modules() if isinstance(m, DomainBatchNorm))
    batch: dict[int, Any] = {} if per_image else {0: Dim("N")}
    if not hasattr(model, "stride"):
        return [batch | {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, batch]
    stride: Any = model.stride
    min_side: Any = model.min_side
    if min(size) < min_side or any(side % stride for side in size):
        raise UserError(f"size takes multiples of {stride} from {min_side} on for a RetinaNet, got {size}")
    return [batch | {k: stride * Dim(name, min=min_side // stride) for k, name in ((2, "H"), (3, "W"))}]


def _check_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"format 'onnx' needs packages that are not installed: pip install {' '.join(missing)}")


def _prepared(model: nn.Module, domain: int | str | None, statistics: str, fused: bool) -> nn.Module:
    """A copy that predicts as is asked."""
    if statistics not in ("population", "minibatch"):
        raise UserError(f"statistics takes one of ['population', 'minibatch'], got {statistics!r}")
    if fused and statistics == "minibatch":
        raise UserError("minibatch statistics cannot be fused: each image has its own")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    layers = with_domains(model)
    if layers and domain is None:
        names = next((layer.domain_names for layer in layers.values() if layer.domain_names), None)
        first = next(iter(layers.values()))
        known = list(names) if names else f"0 to {first.num_domains // first.domains_per_name - 1}"
        raise UserError(f"norms of the model have domains: say which to export for, of {known}")
    try:
        if domain is not None:
            keep_domain(model, domain)
        if any(isinstance(m, DomainBatchNorm) for m in model.modules()) or statistics == "minibatch":
            set_statistics(model, statistics)
        return fuse(model) if fused else model
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot be exported: {error}") from error


@torch.no_grad()
def _attempt(
    model: nn.Module, format: str, dims: dict[int, Any], sizes: Sizes, description: dict[str, Any]
) -> tuple[bytes, float]:
    """What the file is to hold, and the largest difference of its outputs for batches of `sizes`."""
    like = next((v for v in (*model.parameters(), *model.buffers()) if v.is_floating_point()), torch.zeros(()))
    random = torch.Generator().manual_seed(0)
    batches = [torch.rand(n, 3, *size, generator=random).to(like) for n, *size in sizes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program = torch.export.export(model, (batches[0],), dynamic_shapes=(dims,))
        content, run = (_onnx if format == "onnx" else _torch)(program, _named(model(batches[0])), description)
    differences = [
        _difference(own, other)
        for images in batches
        for own, other in zip(_named(model(images)).values(), run(images), strict=True)
    ]
    return content, float(torch.stack(differences).max())


def _torch(
    program: Any, outputs: dict[str, Tensor], description: dict[str, Any]
) -> tuple[bytes, Callable[[Tensor], Sequence[Tensor]]]:
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={DESCRIPTION: json.dumps(description)} if description else None)
    loaded: Any = torch.export.load(io.BytesIO(stream.getvalue())).module()
    return stream.getvalue(), lambda images: list(_named(loaded(images)).values())


def _onnx(
    program: Any, outputs: dict[str, Tensor], description: dict[str, Any]
) -> tuple[bytes, Callable[[Tensor], Sequence[Tensor]]]:
    import onnxruntime

    made: Any = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["images"], output_names=list(outputs)
    )
    proto = made.model_proto
    add_metadata(proto, description)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: [torch.as_tensor(v) for v in session.run(None, {"images": images.numpy()})]


def _named(outputs: Any) -> dict[str, Tensor]:
    """What a model returns, by name; a single tensor is `logits`."""
    named = outputs if isinstance(outputs, dict) else {"logits": outputs}
    if not all(isinstance(value, Tensor) for value in named.values()):
        raise TypeError(f"expected a model that returns a tensor or a dict of tensors, got {type(outputs).__name__}")
    return named


def _difference(own: Tensor, other: Tensor) -> Tensor:
    if own.shape != other.shape:
        raise ValueError(f"expected an output of shape {tuple(own.shape)}, got {tuple(other.shape)}")
    return ((own - other).abs().max() / own.abs().max().clamp(min=1)).float().cpu()
