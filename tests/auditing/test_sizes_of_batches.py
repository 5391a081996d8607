"""Batches of images of different sizes are no batches of different sources."""

import torch
from torch import nn

import domainnorm as dn


def test_coarse_features_of_large_and_small_images():
    """A map of one place has the zeros around it in each convolution, one of many hardly any."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 4, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False))
    model.append(nn.BatchNorm2d(8, momentum=None))
    sizes = [(4, 4), (32, 32)] * 6
    batches = [1 + torch.randn(16, 3, *size) for size in sizes]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    report = dn.audit(model.eval(), batches, progress=False)
    assert report.layers[0]["between_batches"] > report.thresholds.mixed_batches
    assert "batches of different sources" not in [finding.kind for finding in report.findings]
    same = [batch[:, :, :4, :4] + (k % 2) for k, batch in enumerate(batches)]
    found = dn.audit(model.eval(), same, progress=False).findings
    assert "batches of different sources" in [finding.kind for finding in found]
