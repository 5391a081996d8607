"""Fused models compute the same, with fewer layers; what cannot be fused is left, or refused with a reason."""

import pytest
import tiny
import torch
import torchvision
from torch import nn

import domainnorm as dn

NORMS = (dn.DomainBatchNorm, nn.modules.batchnorm._BatchNorm)


def with_statistics(model):
    for module in model.modules():
        if isinstance(module, NORMS):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, 1, 0.3)
    return model.double().eval()


def count(model):
    return sum(isinstance(module, NORMS) for module in model.modules())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, dn.DomainBatchNorm, dn.FrozenBatchNorm])
def test_resnet(norm):
    model = with_statistics(torchvision.models.resnet18(norm_layer=norm, num_classes=3))
    before, x = count(model), torch.randn(2, 3, 40, 40, dtype=torch.float64)
    fused = dn.fuse(model)
    assert count(fused) == 0 and count(model) == before == 20
    torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "choices", [{}, tiny.MASK_RCNN | {"MODEL__BACKBONE__NORM": "BN"}], ids=["RetinaNet", "Mask R-CNN"]
)
def test_detectors(tmp_path, choices):
    cfg = tiny.config(tiny.write_dataset(tmp_path / "set"), tmp_path, **choices)
    model = with_statistics(dn.build_model(cfg))
    fused = dn.fuse(model)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    levels, expected = fused.backbone(x), model.backbone(x)
    torch.testing.assert_close(levels, expected, rtol=1e-9, atol=1e-9)
    if choices:
        assert count(fused) == 0
        rois = torch.rand(3, 8, 14, 14, dtype=torch.float64)
        torch.testing.assert_close(fused.roi_heads.mask_head(rois), model.roi_heads.mask_head(rois))
    else:  # statistics per level stay
        assert count(fused) == 2
        torch.testing.assert_close(fused.head([*levels.values()]), model.head([*levels.values()]), rtol=1e-9, atol=1e-9)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear, self.last = nn.Conv2d(2, 2, 1), dn.DomainBatchNorm(2), nn.Linear(4, 3), None
        self.last = nn.BatchNorm1d(3)

    def forward(self, x):
        x = self.norm(self.conv(x)) + self.norm(self.conv(2 * x))
        return self.last(self.linear(x.flatten(1)))


def test_layers_used_twice_stay_and_linear_layers_fuse():
    model = with_statistics(Reused())
    fused = dn.fuse(model)
    x = torch.randn(3, 2, 1, 2, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))
    assert isinstance(fused.norm, dn.DomainBatchNorm) and isinstance(fused.last, nn.Identity)


def test_refusals():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), dn.DomainBatchNorm(2))
    with pytest.raises(ValueError, match=r"1 is in training mode.*optimized differently"):
        dn.fuse(model)
    with pytest.raises(ValueError, match="1 uses minibatch statistics"):
        dn.fuse(dn.set_statistics(model.eval(), "minibatch"))
