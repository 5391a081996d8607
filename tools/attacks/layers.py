"""Run every norm on random shapes, strides and dtypes, forward and backward, against torch's operations in float64.

Each case runs in its own process, so that a crash counts as one failure only.
"""

import argparse
import contextlib
import copy
import os
import random
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import domainnorm as dn

from .outcome import Outcomes, in_child

EPS = 1e-3  # so that rounding is not magnified where a channel is constant
# of the largest number
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
VARIABLE = "DOMAINNORM_BACKEND"
KINDS = (
    *("DomainBatchNorm", "GhostBatchNorm", "SeqNorm", "BatchGroupNorm"),
    *("GroupedBatchNorm", "BatchRenorm", "FrozenBatchNorm"),
)


def make_layer(random: Random, channels: int) -> tuple[nn.Module, int]:
    """A layer with a random affine and random running statistics, and the number of its domains."""
    domains, divisors = 1, [k for k in range(1, channels + 1) if channels % k == 0]
    options: dict[str, Any] = {"eps": EPS, "affine": random.choice(("shared", "shared", None))}
    kind = random.choice(KINDS)
    if kind == "DomainBatchNorm":
        domains = random.randint(1, 3)
        choices = ("shared", "per_domain")
        options |= {name: random.choice(choices) for name in ("sgd_statistics", "population_statistics", "affine")}
        options |= {"num_domains": domains, "momentum": random.choice((0.1, None))}
    elif kind == "GhostBatchNorm":
        name, most = random.choice((("samples_per_group", 4), ("num_sample_groups", 3)))
        options |= {name: random.randint(1, most)}
    elif kind == "SeqNorm":
        options |= {"num_channel_groups": random.choice(divisors), "num_sample_groups": random.randint(1, 3)}
        options |= {"group_norm_first": random.random() < 0.5}
    elif kind == "BatchGroupNorm":
        options |= {"num_groups": random.choice(divisors)}
    elif kind == "GroupedBatchNorm":
        options |= {"num_channel_groups": random.choice(divisors), "samples_per_group": random.randint(1, 3)}
    elif kind == "BatchRenorm":
        options |= {"r_max": random.choice((1.0, 3.0)), "d_max": random.choice((0.0, 5.0))}
        options |= {"samples_per_group": random.choice((None, None, 1, 2))}
    else:
        options = {"eps": EPS}
    layer = getattr(dn, kind)(channels, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(1, 0.5)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer, domains


def make_input(random: Random, channels: int, dtype: torch.dtype) -> Tensor:
    """`(N, C, *)`, of any strides."""
    shape = [random.choice((0, 1, 2, 3, 4, 5, 6, 8)), channels]
    shape += [random.choice((1, 1, 2, 3, 5, 8, 17)) for _ in range(random.choice((0, 1, 2, 2, 2, 2, 3)))]
    if random.random() < 0.03:
        shape[-1] *= 64
    layout = random.choice(("contiguous", "channels_last", "permuted", "sliced", "expanded", "offset", "flipped"))
    if layout == "permuted":
        order = list(range(len(shape)))
        random.shuffle(order)
        x = _numbers([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(len(shape))])
    elif layout == "sliced":
        x = _numbers([2 * size + 1 for size in shape])
        for axis, size in enumerate(shape):
            x = x.narrow(axis, 1, 2 * size)[(slice(None),) * axis + (slice(None, None, 2),)]
    elif layout == "expanded":
        axis = random.randrange(len(shape))
        x = _numbers([1 if k == axis else size for k, size in enumerate(shape)]).expand(shape)
    elif layout == "offset":
        x = _numbers([shape[0] + 1, *shape[1:]])[1:]
    elif layout == "flipped":
        x = _numbers(shape).flip(0)
    else:
        x = _numbers(shape)
        if layout == "channels_last" and x.ndim in (4, 5):
            x = x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    return x.to(dtype)


def _numbers(shape: list[int]) -> Tensor:
    """Input with a mean of about 3."""
    return torch.randn(shape) * (0.3 + torch.rand(1)) + 3 * torch.randn(1)


@contextlib.contextmanager
def _by_torch_alone() -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "eager"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def step(layer: nn.Module, inputs: list[Tensor], domain: Any, backward: str) -> list[Tensor]:
    """Outputs, gradients of inputs and parameters, and buffers after a step."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = layer(leaves) if domain == "list" else layer(leaves[0], **({} if domain is None else {"domain": domain}))
    outputs = result if domain == "list" else [result]
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    found = list(outputs)
    if outputs[0].requires_grad:
        if backward == "sum":  # whose gradient has strides of 0
            loss = sum(y.double().sum() for y in outputs)
        else:
            generator = torch.Generator().manual_seed(1)
            weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
            loss = sum((y.double() * weight).sum() for y, weight in zip(outputs, weights, strict=True))
        gradients = torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True)
        found += [gradient for gradient in gradients if gradient is not None]
    return [tensor.detach() for tensor in (*found, *layer.buffers())]


def one_case(number: int, seed: int) -> str | None:
    """None if a layer does as its reference, or the line with which both refuse the input.

    Raises:
        AssertionError: they differ.
    """
    one = random.Random(f"{seed} {number}")
    torch.manual_seed(one.randrange(2**31))
    torch.set_num_threads(one.choice((1, 2)))
    dtype = one.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))
    channels = one.choice((1, 2, 3, 4, 6, 8, 12, 16, 33))
    layer, domains = make_layer(one, channels)
    if dtype == torch.float64 or (dtype != torch.float32 and one.random() < 0.3):
        layer = layer.to(dtype)
    layer.train(one.random() < 0.7)
    x = make_input(one, channels, dtype)
    inputs, domain = [x], None
    if domains > 1 and one.random() < 0.5:
        inputs, domain = [x, *(make_input(one, channels, dtype) for _ in range(domains - 1))], "list"
    elif domains > 1:
        domain = one.choice((one.randrange(domains), torch.tensor([one.randrange(domains) for _ in range(len(x))])))
        domain = domain.long() if isinstance(domain, Tensor) else domain
    backward = one.choice(("sum", "weighted"))
    reference = copy.deepcopy(layer).double()
    with _by_torch_alone():
        expected, refused = _try(reference, [x.double().contiguous() for x in inputs], domain, backward)
    found, error = _try(layer, inputs, domain, backward)
    shapes = [(tuple(x.shape), x.stride()) for x in inputs]
    what = f"{layer} {'training' if layer.training else 'eval'} {shapes} {dtype}"
    assert (error is None) == (refused is None), f"{what}: got {error!r}, expected {refused!r}"
    if error is not None:
        return str(error)
    parameter_dtype = next((p.dtype for p in layer.parameters()), dtype)
    tolerance = max(TOLERANCE[dtype], TOLERANCE[parameter_dtype])
    # Gradients of parameters are sums of so many numbers: they may cancel, but their rounding, torch's too, does not.
    summed = sum(x.numel() for x in inputs) / channels / 100
    for index, (one_tensor, other) in enumerate(zip(found, expected, strict=True)):
        assert one_tensor.shape == other.shape, f"{what}: shape {one_tensor.shape}, expected {other.shape}"
        largest = max(1.0, other.abs().max().item()) if other.numel() else 1.0
        if 2 * len(inputs) <= index < len(found) - len(list(layer.buffers())):  # gradients of parameters
            largest = max(largest, summed)
        difference = (one_tensor.double() - other).abs().max().item() if other.numel() else 0.0
        assert difference <= tolerance * largest, f"{what}: tensor {index} differs by {difference:.2g} of {largest:.2g}"
    return None


def _try(layer: nn.Module, inputs: list[Tensor], domain: Any, backward: str) -> tuple[list[Tensor], Exception | None]:
    try:
        return step(layer, inputs, domain, backward), None
    except (ValueError, TypeError) as error:  # what a layer says of its input; torch's RuntimeErrors are failures
        return [], error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def attack(args: argparse.Namespace, folder: Path) -> Outcomes:
    torch.set_num_threads(1)  # or the processes begin with threads that they do not have
    dn.GhostBatchNorm(4, samples_per_group=2)(torch.randn(4, 4, 3, 3))  # so that what it loads is there in each process
    outcomes = Outcomes(args.seed)
    for number in range(args.number):
        outcomes.count(number, "layers", lambda number=number: in_child(lambda: one_case(number, args.seed)))
    return outcomes
