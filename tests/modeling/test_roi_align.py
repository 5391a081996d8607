"""RoIAlign as bags of rows against torchvision's kernel."""

import math

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign, roi_align

from domainnorm.modeling.roi_align import RoIAlign

LEVELS = ["0", "1", "2", "3"]
IMAGE = (256, 320)


def features(dtype=torch.float64, images=2, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(images, 3, 64 >> k, 80 >> k, generator=generator, dtype=dtype) for k in range(4)]
    return {name: m.to(memory_format=memory_format).requires_grad_() for name, m in zip(LEVELS, maps, strict=True)}


def boxes_of(*counts):
    """Boxes of all sizes from none to the whole image's, some of them beyond its border."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 360 - 30
        side = torch.rand(count, 2, generator=generator, dtype=torch.float64) ** 3 * 400
        found.append(torch.cat([corner, corner + side], 1))
    return found


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "samples"), [(7, 2), (14, 2), ((3, 5), 1), (2, 3)])
@pytest.mark.parametrize("counts", [(200, 3), (0, 5), (0, 0), (1,)])
def test_values_and_gradients_are_torchvisions(counts, size, samples, memory_format):
    maps = features(images=len(counts), memory_format=memory_format)
    boxes, shapes = boxes_of(*counts), [IMAGE] * len(counts)
    of_each = []
    for kind in (MultiScaleRoIAlign, RoIAlign):
        y = kind(LEVELS, size, samples)(maps, boxes, shapes)
        weight = torch.rand(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
        of_each.append((y, *torch.autograd.grad((y * weight).sum(), list(maps.values()))))
    torch.testing.assert_close(*of_each, rtol=1e-10, atol=1e-10)


def aligned_by_hand(maps, boxes, size, samples):
    """torchvision's kernel, RoI by RoI, at the level of its area (Feature Pyramid Networks, Eq. 1)."""
    found = []
    for image, own in enumerate(boxes):
        for box in own:
            area = float((box[2] - box[0]) * (box[3] - box[1]))
            level = min(max(math.floor(4 + math.log2(area**0.5 / 224 + 1e-6)), 2), 5) - 2
            roi = torch.cat([torch.tensor([float(image)]).to(box), box])[None]
            found.append(roi_align(maps[str(level)], roi, size, 0.25 / 2**level, samples, aligned=True))
    return torch.cat(found)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("size", "samples"), [(7, 2), (14, 0), ((3, 5), 1)])
def test_aligned_as_detectron2s(size, samples, training):
    maps, boxes = features(), boxes_of(60, 3)
    ours = RoIAlign(LEVELS, size, samples, aligned=True).train(training)(maps, boxes, [IMAGE] * 2)
    expected = aligned_by_hand(maps, boxes, size, samples)
    weight = torch.rand(ours.shape, generator=torch.Generator().manual_seed(2), dtype=ours.dtype)
    of_each = [
        (y, *torch.autograd.grad((y * weight).sum(), list(maps.values()), materialize_grads=True))
        for y in (ours, expected)
    ]
    torch.testing.assert_close(*of_each, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours, RoIAlign(LEVELS, size, samples)(maps, boxes, [IMAGE] * 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_are_not_rounded_with_the_features(dtype):
    place = torch.arange(200.0)
    maps = {"0": torch.stack([(place / 3).sin()[:, None].expand(200, 200), (place / 3).cos().expand(200, 200)])[None]}
    boxes = [torch.tensor([[601.3, 603.7, 700.2, 705.9]])]
    pool = RoIAlign(["0"], 7, 0, aligned=True)
    exact = pool(maps, boxes, [(800, 800)])
    torch.testing.assert_close(pool({"0": maps["0"].to(dtype)}, boxes, [(800, 800)]).float(), exact, atol=6e-3, rtol=0)


def test_aligned_without_rois():
    maps = features()
    y = RoIAlign(LEVELS, 7, 0, aligned=True)(maps, boxes_of(0, 0), [IMAGE] * 2)
    assert y.shape == (0, 3, 7, 7)
    y.sum().backward()


def test_without_training_it_is_torchvisions_to_the_bit():
    maps, boxes = features(torch.float32), [b.float() for b in boxes_of(50, 3)]
    ours, theirs = (kind(LEVELS, 7, 2).eval()(maps, boxes, [IMAGE] * 2) for kind in (RoIAlign, MultiScaleRoIAlign))
    assert torch.equal(ours, theirs)


def test_bfloat16_features_are_summed_in_float32():
    maps, boxes = features(torch.bfloat16), [b.float() for b in boxes_of(50, 3)]
    got = RoIAlign(LEVELS, 7, 2)(maps, boxes, [IMAGE] * 2)
    wide = RoIAlign(LEVELS, 7, 2)({name: m.float() for name, m in maps.items()}, boxes, [IMAGE] * 2)
    assert got.dtype == torch.bfloat16 and torch.equal(got, wide.bfloat16())
