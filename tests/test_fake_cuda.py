"""Both detectors on a GPU that is not there: tensors of FakeTensorMode have a device and a shape, but no values.

A tensor that is left on the CPU raises. Where the program needs a value, or a shape that depends on values, a GPU would
have to be waited for: these places are listed, with the answer that every element is true.
"""

import math
import traceback
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import domainnorm as dn
from domainnorm.layers.build import LAYERS as NORMS

aten = torch.ops.aten
CASES = [*((norm, True) for norm in ["", *NORMS]), ("BN", False), ("SeqNorm", False)]
OURS, TORCHVISION = (Path(package.__file__).parent for package in (dn, torchvision))


class HostReads(TorchDispatchMode):
    """Lists the places that read a value (`values`) or a number of elements (`shapes`), as "file:function"."""

    def __init__(self):
        super().__init__()
        self.values, self.shapes = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:
            self.values.add(place())
            return False if args[0].dtype == torch.bool else 0
        if func is aten.nonzero.default:
            self.shapes.add(place())
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
        if func is torch.ops.torchvision.nms.default:
            self.shapes.add(place())
            return args[0].new_empty(len(args[0]), dtype=torch.long)
        if func is aten.index.Tensor and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.shapes.add(place())
            args = (args[0], [index for i in args[1] for index in as_integers(i)])
        return func(*args, **(kwargs or {}))


def as_integers(index):
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.long) for _ in index.shape]


def place():
    """The innermost function of ours or of torchvision that is being run."""
    for frame in reversed(traceback.extract_stack()):
        for package in (OURS, TORCHVISION):
            if package in Path(frame.filename).parents and frame.name != "<listcomp>":
                return f"{Path(frame.filename).relative_to(package.parent)}:{frame.name}"
    return "elsewhere"


def ours(places):
    return {place for place in places if not place.startswith("torchvision")}


def detector(architecture, norm):
    norms = {"MODEL__BACKBONE__NORM": norm, "MODEL__FPN__NORM": norm}
    norms |= {"MODEL__NORM__GHOSTBN__GROUP_SIZE": 2, "MODEL__NORM__SEQNORM__BATCH_GROUPS": 2}
    norms |= {"MODEL__NORM__BGN__SPLIT_SPACE": False}
    if architecture == "RetinaNet":
        norms |= {"MODEL__RETINANET__NORM": norm, "MODEL__RETINANET__NUM_CLASSES": 2}
    else:
        heads = {"MODEL__ROI_BOX_HEAD__NORM": norm, "MODEL__ROI_MASK_HEAD__NORM": norm}
        norms = tiny.MASK_RCNN | norms | heads | {"MODEL__ROI_HEADS__NUM_CLASSES": 2}
    return dn.build_model(tiny.config("shapes_train", Path("unused"), **norms))


def on_fake_cuda(model):
    """Parameters and buffers become fake tensors on `cuda`."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    tensors[name] = nn.Parameter(fake) if isinstance(value, nn.Parameter) else fake
    return model


def forward(model, training):
    """The places that a forward pass of two images waits at."""
    with FakeTensorMode(allow_non_fake_inputs=True), HostReads() as reads:
        on_fake_cuda(model).train(training)
        images = [torch.empty(3, 64, 96, device="cuda") for _ in range(2)]
        targets = [
            {
                "boxes": torch.empty(3, 4, device="cuda"),
                "labels": torch.empty(3, dtype=torch.long, device="cuda"),
                "masks": torch.empty(3, 64, 96, dtype=torch.uint8, device="cuda"),
            }
            for _ in images
        ]
        outputs = [model(images, targets)] if training else model(images)
        for output in outputs:
            assert {value.device.type for value in output.values()} == {"cuda"}
    return reads


@pytest.mark.parametrize(("norm", "training"), CASES)
def test_retinanet_waits_for_torchvision_only(norm, training):
    reads = forward(detector("RetinaNet", norm), training)
    degenerate_boxes = {"torchvision/models/detection/retinanet.py:forward"}
    assert reads.values == (degenerate_boxes if training else set())
    assert not ours(reads.shapes)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "training"), CASES)
def test_mask_rcnn_waits_for_torchvision_and_for_its_positive_rois(norm, training):
    reads = forward(detector("GeneralizedRCNN", norm), training)
    assert not ours(reads.values)
    # The mask branch computes positive RoIs only: how many there are must be known.
    assert ours(reads.shapes) == ({"domainnorm/modeling/mask_rcnn.py:_positive"} if training else set())


@pytest.mark.parametrize(
    "planted", [lambda x: x.cpu(), lambda x: x * x.mean().item(), lambda x: x + torch.ones(x.shape[1:])]
)
def test_a_planted_wait_is_found(planted):
    model = detector("RetinaNet", "BN")
    layer = next(layer for layer in model.modules() if isinstance(layer, dn.DomainBatchNorm))
    original = type(layer).forward
    with mock.patch.object(layer, "forward", lambda x, *args: original(layer, planted(x), *args)):
        try:
            reads = forward(model, training=True)
        except RuntimeError as error:
            assert "device" in str(error)
        else:
            assert reads.values - {"torchvision/models/detection/retinanet.py:forward"}


def test_fakes_have_the_shapes_that_are_asked_for():
    with FakeTensorMode(), HostReads() as reads:
        x = torch.empty(4, 5, device="cuda")
        assert (x > 0).nonzero().shape == (20, 2) and x[x > 0].shape == (math.prod(x.shape),)
        assert x[(x > 0).any(1)].shape == (4, 5) and not (x > 0).any().item()
    assert reads.values == reads.shapes == {"elsewhere"}
