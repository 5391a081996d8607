"""Kernels for GPUs, as far as they can be tested without one: in Triton's interpreter, and compiled."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from domainnorm.ops import triton

HERE = Path(__file__).parent
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def release(package):
    """Its version, which compares with others; 0 where it is not installed."""
    return np.lib.NumpyVersion(version(package) if importlib.util.find_spec(package) else "0.0.0")


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(
    release("triton") < "3.7.0" and release("numpy") >= "2.4.0",
    reason="the interpreter of this Triton does not know this NumPy",
)
def test_they_equal_the_eager_ones_in_the_interpreter():
    in_process("-m", "pytest", "-p", "no:cacheprovider", str(HERE / "triton_in_interpreter.py"), TRITON_INTERPRET="1")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile(capability, tmp_path):
    found = in_process(str(HERE / "triton_compiled.py"), str(capability), TRITON_CACHE_DIR=str(tmp_path))
    assert found.split() == ["_moments", "_merge", "_affine", "_sums", "_gradient", "_moments", "_affine"] * 3


def in_process(*command, **environment):
    ended = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def test_they_are_imported_where_they_are_used():
    code = "import sys, torch, domainnorm as dn; dn.DomainBatchNorm(3)(torch.ones(2, 3, 5, 5)); dn.backends()"
    ours = "domainnorm.ops.triton"
    in_process("-c", f"{code}; assert '{ours}' in sys.modules and '{ours}.kernels' not in sys.modules")


def test_a_cpu_does_without_them():
    assert triton.refusal([torch.randn(2, 3, 8, 8)]) == "it computes on CUDA devices"
    assert torch.cuda.is_available() or triton.unavailable() == "torch finds no CUDA device"


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert triton.unavailable() == "triton is not installed"
    with pytest.warns(UserWarning, match="slower: triton is not installed"):
        assert triton.failure(CPU, torch.float32) == "triton is not installed"


@needs_triton
def test_kernels_that_cannot_run_are_a_failure():
    """Without an interpreter, those on a CPU."""
    with pytest.warns(UserWarning, match="normalization on cpu in torch.float32 goes without Triton's kernels"):
        assert triton.failure(CPU, torch.float32)


@pytest.fixture
def cuda(monkeypatch):
    """A device that is not there: makes tensors of shapes, which the library takes for real ones."""
    monkeypatch.setattr(triton, "Tensor", FakeTensor)
    monkeypatch.setattr(triton, "_failures", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)

    def make(*shapes, dtype=torch.float32):
        with FakeTensorMode(allow_non_fake_inputs=True):
            return [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]

    return make


def test_what_they_take(cuda, monkeypatch):
    monkeypatch.setattr(triton, "failure", lambda *_: "")
    shape = (2, 3, 8, 8)
    for dtype in triton.DTYPES:
        assert triton.refusal(cuda(shape, (0, 3, 1, 1), (4, 3), dtype=dtype)) == ""
    assert "float32" in triton.refusal(cuda(shape, dtype=torch.float64))
    assert triton.refusal(cuda(*[shape] * triton.MAX_TENSORS)) == ""
    assert "up to 16 tensors" in triton.refusal(cuda(*[shape] * (triton.MAX_TENSORS + 1)))
    assert "have channels" in triton.refusal(cuda((2, 0, 8, 8)))
    assert "32 numbers or more" in triton.refusal(cuda((2, 3, 5, 5), (2, 3, 4, 4)))
    (x,) = cuda(shape)
    for other in (x.half(), x.to(memory_format=torch.channels_last), x.cpu(), torch.empty(shape)):
        assert "one dtype on one device" in triton.refusal([x, other])


def test_each_device_and_dtype_is_tried_once(cuda, monkeypatch):
    calls = []
    monkeypatch.setattr(triton, "failure", lambda *args: calls.append(args) or "broken")
    xs = cuda((2, 3, 8, 8))
    for attribute, value in (("is_current_stream_capturing", True), ("get_sync_debug_mode", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, attribute, lambda value=value: value)
            assert "not tried yet" in triton.refusal(xs)
    assert not calls
    for _ in range(2):
        assert triton.refusal(xs) == "broken"
    assert triton.refusal(cuda((2, 3, 8, 8), dtype=torch.float16)) == "broken"
    assert calls == [(xs[0].device, torch.float32), (xs[0].device, torch.float16)]
