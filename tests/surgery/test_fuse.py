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


class Odd(nn.Module):
    """Convolutions before norms that must not be fused, and one that may."""

    def __init__(self):
        super().__init__()
        for name in ("reused", "read", "hooked", "listed", "optional", "good"):
            setattr(self, name, nn.Conv2d(2, 2, 1))
            setattr(self, f"{name}_norm", dn.DomainBatchNorm(2))
        self.listed_norm = dn.DomainBatchNorm(2, num_domains=2, population_statistics="shared")
        self.hooked.register_forward_hook(lambda module, args, output: 2 * output)
        self.alias = self.also = dn.DomainBatchNorm(2)

    def forward(self, x, scale=None):
        x = self.reused_norm(self.reused(x)) + self.reused_norm(self.reused(2 * x))
        x = self.read_norm(self.read(x)) + nn.functional.conv2d(x, self.read.weight)
        x = self.hooked_norm(self.hooked(x))
        both = self.listed_norm([self.listed(x), x])
        x = both[0] + both[1]
        x = self.optional(x)
        if scale is None:
            x = x.relu()
        return self.also(self.good_norm(self.good(self.optional_norm(x))))


def test_only_what_computes_the_same_is_fused():
    model = with_statistics(Odd())
    fused = dn.fuse(model)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))
    assert isinstance(fused.good_norm, nn.Identity) and count(fused) == count(model) - 1


def test_refusals():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), dn.DomainBatchNorm(2))
    with pytest.raises(ValueError, match=r"1 is in training mode.*optimized differently"):
        dn.fuse(model)
    with pytest.raises(ValueError, match="1 uses minibatch statistics"):
        dn.fuse(dn.set_statistics(model.eval(), "minibatch"))
