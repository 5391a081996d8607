"""Run by test_triton.py in a process of its own: compiles the kernels for a GPU that need not be there.

`python triton_compiled.py CAPABILITY` prints the names of those that became machine code, for each type.
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from domainnorm.kernels import gpu, triton_rows


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
for dtype in gpu.TYPES:
    xs = [torch.empty(shape, dtype=dtype) for shape in ((2, 8, 64, 128), (1, 8, 7, 9), (1, 8, 1, 1))]
    rows, channels = torch.empty(4, 8), torch.empty(8)
    triton_rows.moments(xs)
    triton_rows.affine(xs, rows, rows[:1], channels)
    triton_rows.sums(xs, xs, rows)
    triton_rows.gradient(xs, xs, rows, rows, rows, channels)
    triton_rows.moments([torch.empty(64, 64, 7, 7, dtype=dtype)])  # one piece, one warp
