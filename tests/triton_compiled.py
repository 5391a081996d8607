"""Run by test_triton.py in a process of its own: compiles the kernels for a GPU that need not be there.

`python triton_compiled.py CAPABILITY` prints the names of those that became machine code, for each type.
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from domainnorm.kernels import gpu, triton_rows


class NoGPU:
    """What Triton asks a driver for, to compile."""

    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(self, kernel, *others, pieces=0):
    grid = (self.number, pieces or self.pieces)
    options = {"BLOCK": self.block, "num_warps": 8}
    made = kernel.warmup(self.xs, self.firsts, self.lengths, *others, grid=grid, **options)
    assert made.asm["cubin"]
    print(kernel.__name__)


driver.set_active(NoGPU())
triton_rows._Rows.launch = compile_only
for dtype in gpu.TYPES:
    xs = [torch.empty(shape, dtype=dtype) for shape in ((2, 8, 64, 128), (1, 8, 7, 9), (1, 8, 1, 1))]
    rows, channels = torch.empty(4, 8), torch.empty(8)
    triton_rows.moments(xs)
    triton_rows.affine(xs, rows, rows[:1], channels)
    triton_rows.sums(xs, xs, rows)
    triton_rows.gradient(xs, xs, rows, rows, rows, channels)
