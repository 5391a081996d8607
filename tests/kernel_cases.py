"""What the tests of kernels share."""

import shutil
from unittest import mock

import pytest
import torch

import domainnorm as dn
from domainnorm.kernels import compiled, compiled_batches, library

needs_library = pytest.mark.skipif(
    library._LIBRARY is None and shutil.which("c++") is None, reason="there was no compiler at installation"
)
TYPES = [torch.float32, torch.float64, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2}
LAYERS = {
    "DomainBatchNorm": lambda: dn.DomainBatchNorm(16, momentum=None),
    "GhostBatchNorm": lambda: dn.GhostBatchNorm(16, group_size=2),
    "SeqNorm": lambda: dn.SeqNorm(16, channel_groups=4, batch_groups=2),
    "BatchGroupNorm": lambda: dn.BatchGroupNorm(16, num_groups=4),
    "GroupedBatchNorm": lambda: dn.GroupedBatchNorm(16, channel_groups=4, examples_per_group=2),
    "BatchRenorm": lambda: dn.BatchRenorm(16),
}


def tensor(shape, dtype, seed, layout=torch.contiguous_format):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1
    return values.to(dtype).contiguous(memory_format=layout)


class counted:
    """The names of the compiled functions that are called within, in order."""

    def __enter__(self):
        calls, original = [], library.call

        def call(function, *args):
            calls.append(function)
            original(function, *args)

        self.patches = [mock.patch.object(module, "call", call) for module in (compiled, compiled_batches)]
        for patch in self.patches:
            patch.start()
        return calls

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()
