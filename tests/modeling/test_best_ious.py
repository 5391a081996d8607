"""How well anchors fit boxes, against all anchors of torchvision's grid."""

import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from domainnorm.modeling.anchors import AnchorGenerator, ExactAnchorGenerator, best_ious


@pytest.mark.parametrize("size", [(64, 96), (200, 133), (40, 31)])
@pytest.mark.parametrize("exact", [False, True])
def test_as_all_anchors(size, exact):
    sizes = tuple(
        tuple(s * 2 ** (k / 3) if exact else int(s * 2 ** (k / 3)) for k in range(3)) for s in (16, 32, 64, 128)
    )
    generator = (ExactAnchorGenerator if exact else AnchorGenerator)(sizes, ((0.5, 1.0, 2.0),) * 4)
    corners = torch.rand(200, 2) * torch.tensor([size[1], size[0]])
    boxes = torch.cat([corners, corners + torch.rand(200, 2) * 80 + 1], 1)
    boxes = boxes.minimum(torch.tensor([size[1], size[0]] * 2)) + torch.tensor([0, 0, 0.5, 0.5])
    height, width = (side + -side % 32 for side in size)
    features = [torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in (8, 16, 32, 64)]
    (anchors,) = generator(ImageList(torch.zeros(1, 3, height, width), [size]), features)
    found = best_ious(boxes, torch.tensor([size] * 200), generator, [8, 16, 32, 64])
    torch.testing.assert_close(found, box_iou(boxes, anchors).max(1).values, atol=1e-5, rtol=1e-5)
