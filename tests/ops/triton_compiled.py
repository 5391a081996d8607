"""Run by test_triton.py in a process of its own: compiles the kernels for a GPU that need not be there.

`python triton_compiled.py CAPABILITY` prints the names of those that became machine code, for each type.
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from domainnorm.ops import triton


class NoGPU:
    """What Triton asks a driver for, to compile."""

    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(kernel, grid):
    def launch(*args, **options):
        assert kernel.warmup(*args, grid=grid, **options).asm["cubin"]
        print(kernel.__name__)

    return launch


driver.set_active(NoGPU())
JITFunction.__getitem__ = compile_only
for dtype in triton.DTYPES:
    xs = [torch.empty(shape, dtype=dtype) for shape in ((2, 8, 64, 128), (1, 8, 7, 9), (1, 8, 1, 1))]
    samples, rows, channels = [None] * len(xs), torch.empty(4, 8), torch.empty(8)
    triton.moments(xs, samples)
    triton.affine(xs, samples, rows, rows[:1], channels)
    triton.sums(xs, xs, samples, rows)
    triton.gradient(xs, xs, samples, rows, rows, rows[:1], channels)
    triton.moments([torch.empty(64, 64, 7, 7, dtype=dtype)], [None])  # one piece, one warp
    triton.affine([torch.empty(1, 1, 7, 7, dtype=dtype)], [None], *[torch.empty(1, 1)] * 3)  # one row
