"""The code in docs/ runs, and does what is said of it."""

import re
from pathlib import Path

import torch
from torch import nn

import domainnorm as dn

DOCS = Path(__file__).parents[1] / "docs"


def run(file):
    names: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", (DOCS / file).read_text(encoding="utf-8"), re.S):
        exec(compile(snippet, file, "exec"), names)
    return names


def test_fcos_normalizes_each_level_by_itself():
    names = run("fcos.md")
    model = names["model"]
    assert all(torch.isfinite(loss) for loss in names["losses"].values())
    assert {"boxes", "scores", "labels"} <= names["detections"][0].keys()
    assert all(p.grad is not None for p in model.head.parameters())
    head = model.head.classification_head
    norms = [layer for layer in head.modules() if isinstance(layer, dn.DomainBatchNorm)]
    assert len(norms) == 4 and norms[0].running_mean.shape == (5, 256)
    assert norms[0].num_batches_tracked.tolist() == [1] * 5
    levels = [torch.randn(2, 256, 16 >> k, 16 >> k) for k in range(5)]
    separate = [nn.BatchNorm2d(256).train() for _ in levels]
    got = norms[0].train()(levels)
    for level, layer, y in zip(levels, separate, got, strict=True):
        torch.testing.assert_close(y, layer(level), atol=1e-5, rtol=1e-5)
