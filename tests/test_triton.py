"""Kernels for GPUs, as far as they can be tested without one: in Triton's interpreter, and compiled."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from domainnorm import kernels
from domainnorm.kernels import gpu, plain

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(
    np.lib.NumpyVersion(triton.__version__) < "3.7.0" and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of this Triton does not know this NumPy",
)
def test_they_equal_the_plain_ones_in_the_interpreter():
    in_process("-m", "pytest", "-p", "no:cacheprovider", str(HERE / "triton_in_interpreter.py"), TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile(capability, tmp_path):
    found = in_process(str(HERE / "triton_compiled.py"), str(capability), TRITON_CACHE_DIR=str(tmp_path))
    assert found.split() == ["_moments", "_merge", "_affine", "_sums", "_gradient", "_moments"] * 3


def in_process(*command, **environment):
    ended = subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, cwd=HERE.parent, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def test_a_cpu_does_without_them():
    assert gpu.rows([torch.randn(2, 3, 4)]) is None and kernels.kernel([torch.randn(2, 3, 4).half()]) is plain
