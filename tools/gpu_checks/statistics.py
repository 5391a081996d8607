"""Population statistics of a ResNet, recomputed on a device; tensors of waiting batches leave its memory."""

import copy
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from benchmarks.table import Row
from torch import Tensor, nn

import domainnorm as dn

LIMIT = 1e-3  # of the error, in standard deviations (means) and as a share (variances)


def measure(device: str, small: bool) -> Iterator[Row]:
    """Exact statistics, against one batch in float64 on the CPU; and pooled ones, which are other ones."""
    torch.backends.cudnn.allow_tf32 = False  # results are compared with those of a CPU
    number, size, pixels = (3, 2, 32) if small else (8, 16, 192)
    torch.manual_seed(0)
    model = dn.convert_batchnorm(torchvision.models.resnet18(), "DomainBatchNorm")
    batches = [torch.randn(size, 3, pixels, pixels) * (k + 1) + k for k in range(number)]
    expected = _one_batch(copy.deepcopy(model), torch.cat(batches))
    model.to(device)
    batches = [batch.to(device) for batch in batches]
    kept = [batch.clone() for batch in batches]
    with tempfile.TemporaryDirectory() as folder:
        for where, options in {
            "all on the device": {},
            "two on the device, others in memory": {"live": 2},
            "one on the device, others in a folder": {"live": 1, "folder": folder},
        }.items():
            yield _run(model, batches, kept, expected, "exact", where, options, device)
    yield _run(model, batches, kept, None, "pooled", "one at a time", {}, device)


def _run(
    model: nn.Module,
    batches: list[Tensor],
    kept: list[Tensor],
    expected: dict[str, Tensor] | None,
    method: str,
    where: str,
    options: dict[str, Any],
    device: str,
) -> Row:
    model = copy.deepcopy(model)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    began = time.perf_counter()
    dn.recompute_population_statistics(model, batches, method=method, progress=False, **options)
    found = {name: value.double().cpu() for name, value in model.named_buffers()}  # waits
    row = {"method": method, "batches": where, "seconds": time.perf_counter() - began}
    if device == "cuda":
        row["MB at the peak"] = (torch.cuda.max_memory_allocated() - held) / 1e6
    error = 0.0 if expected is None else _error(found, expected)
    # Inputs belong to the caller: they are back, unchanged.
    same = all(torch.equal(batch, before) for batch, before in zip(batches, kept, strict=True))
    finite = all(value.isfinite().all() for value in found.values())
    return {**row, "error": error, "passed": bool(same and finite and error <= LIMIT)}


def _one_batch(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    for layer in model.modules():
        if isinstance(layer, dn.DomainBatchNorm):
            layer.momentum = 1.0
    with torch.no_grad():
        model.double().train()(images.double())
    return dict(model.named_buffers())


def _error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    errors = []
    for name, value in expected.items():
        if name.endswith("running_mean"):
            deviation = expected[name.replace("mean", "var")].sqrt()
            errors.append((found[name] - value).abs() / deviation)
        elif name.endswith("running_var"):
            errors.append((found[name] / value - 1).abs())
    return torch.cat(errors).max().item()
