"""What the tests of kernels share."""

import shutil

import pytest
import torch

import domainnorm as dn
from domainnorm.ops import native

needs_library = pytest.mark.skipif(
    not native.is_available() and shutil.which("c++") is None, reason="there was no compiler at installation"
)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LAYERS = {
    "DomainBatchNorm": lambda: dn.DomainBatchNorm(16, momentum=None),
    "GhostBatchNorm": lambda: dn.GhostBatchNorm(16, samples_per_group=2),
    "SeqNorm": lambda: dn.SeqNorm(16, num_channel_groups=4, num_sample_groups=2),
    "BatchGroupNorm": lambda: dn.BatchGroupNorm(16, num_groups=4),
    "BatchGroupNorm of pieces": lambda: dn.BatchGroupNorm(16, num_groups=48),
    "GroupedBatchNorm": lambda: dn.GroupedBatchNorm(16, num_channel_groups=4, samples_per_group=4),
    "BatchRenorm": lambda: dn.BatchRenorm(16),
    "BatchRenorm in groups": lambda: dn.BatchRenorm(16, samples_per_group=2),
}


def tensor(shape, dtype, seed, layout=torch.contiguous_format):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1
    return values.to(dtype).contiguous(memory_format=layout)


def training_step(layer, xs, dtype=None, domain=None):
    """Outputs, gradients and buffers of a step; `xs` is a tensor or a list of them."""
    several = isinstance(xs, list)
    leaves = [x.detach().requires_grad_() for x in (xs if several else [xs])]
    ys = layer(leaves if several else leaves[0], domain)
    ys = list(ys) if several else [ys]
    torch.autograd.backward(ys, [torch.cos(x.detach().double()).to(x) for x in leaves])
    return [*ys, *(x.grad for x in leaves), *(p.grad for p in layer.parameters()), *layer.buffers()]
