"""The functions of segments that the library chooses, against the formulas; and which backends its layers took."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from benchmarks.layers import LAYERS, LAYOUTS
from benchmarks.table import Row
from benchmarks.timing import milliseconds, times
from torch import Tensor

import domainnorm as dn
from domainnorm.ops import eager

from .backend import FASTEST, chosen, name_of, used_by

LEVELS = ((2, 256, 100, 167), (2, 256, 50, 84), (2, 256, 25, 42), (2, 256, 13, 21), (2, 256, 7, 11))
SHAPES = {
    "large": ((16, 64, 112, 112),),
    "middle": ((8, 256, 28, 28),),
    "short rows": ((64, 512, 7, 7),),
    "few long rows": ((1, 3, 800, 1333),),
    "odd sizes": ((3, 5, 33, 17),),
    "five levels": LEVELS,
}
SMALL = {
    "middle": ((2, 4, 9, 8),),
    "five levels": ((2, 4, 8, 9), (2, 4, 4, 5), (2, 4, 2, 3), (2, 4, 1, 2), (2, 4, 1, 1)),
}
# The largest error, as a share of the largest value: of what is in the type of the input, and of sums in float32.
TYPES = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SUMS_LIMIT = 1e-4
PASSES = {"moments": 1, "affine": 2, "sums": 2, "gradient": 3}  # tensors read and written


def measure(device: str, small: bool) -> Iterator[Row]:
    """Functions, then layers."""
    for label, shapes in (SMALL if small else SHAPES).items():
        for dtype in TYPES:
            yield from _functions(label, shapes, dtype, device, repeats=1 if small else 7)
    for layout in LAYOUTS:
        for dtype in TYPES:
            yield from _layers(dtype, layout, device, small)


def _functions(label: str, shapes: Any, dtype: torch.dtype, device: str, repeats: int) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 2 + 1).to(device)

    xs, grads = ([random(*shape).to(dtype) for shape in shapes] for _ in range(2))
    samples = [None] * len(xs)
    rows = (sum(shape[0] for shape in shapes), shapes[0][1])
    scale, center, shift, slope, offset = (random(*rows) for _ in range(5))
    module = chosen(xs)
    for function, given in {
        "moments": (xs, samples),
        "affine": (xs, samples, scale, center, shift),
        "sums": (grads, xs, samples, center),
        "gradient": (grads, xs, samples, scale, center, slope, offset),
    }.items():
        ours, formula = getattr(module, function, FORMULAS[function]), FORMULAS[function]
        expected = formula(*map(_double, given))
        errors = [_error(run(*given), expected) for run in (ours, formula)]
        runs = {
            "ours": lambda run=ours, given=given: run(*given),
            "eager": lambda run=formula, given=given: run(*given),
        }
        taken = times(runs, repeats, seconds=0.0 if repeats == 1 else 0.003, device=device)
        limit = SUMS_LIMIT if function in ("moments", "sums") else TYPES[dtype]
        moved = PASSES[function] * sum(x.nbytes for x in xs)
        yield {
            "function": function,
            "shapes": label,
            "type": _name(dtype),
            "kernel": name_of(module),
            "error": errors[0],
            "error, eager": errors[1],
            "ms": milliseconds(taken, "ours"),
            "ms, eager": milliseconds(taken, "eager"),
            "GB/s": moved / 1e6 / milliseconds(taken, "ours"),
            "passed": errors[0] <= limit and name_of(module) == FASTEST.get(device, name_of(module)),
        }


def _sums(grads: Sequence[Tensor], xs: Sequence[Tensor], samples: Any, center: Tensor) -> list[Tensor]:
    """Σ grad and Σ grad · (x - center) of each sample and channel."""
    found = []
    for x, grad, own in zip(xs, grads, center.split([len(x) for x in xs]), strict=True):
        grad = grad.to(center.dtype)
        found.append(torch.stack([grad.sum((2, 3)), (grad * (x - own[..., None, None])).sum((2, 3))]))
    return list(torch.cat(found, 1))


def _gradient(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    samples: Any,
    scale: Tensor,
    center: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> list[Tensor]:
    """`scale · grad + slope · (x - center) + offset`."""
    values = (v.split([len(x) for x in xs]) for v in (scale, center, slope, offset))
    found = []
    for x, grad, *own in zip(xs, grads, *values, strict=True):
        row_scale, row_center, row_slope, row_offset = (v[..., None, None] for v in own)
        found.append((row_scale * grad + row_slope * (x - row_center) + row_offset).to(x.dtype))
    return found


FORMULAS: dict[str, Callable[..., Sequence[Tensor]]] = {
    "moments": eager.moments,
    "affine": eager.affine,
    "sums": _sums,
    "gradient": _gradient,
}


def _double(value: Any) -> Any:
    if isinstance(value, list):
        return [_double(x) for x in value]
    return value.double() if isinstance(value, Tensor) else value


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, as a share of the largest value expected."""
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        for a, b in zip(found, expected, strict=True)
    )


def _layers(dtype: torch.dtype, layout: str, device: str, small: bool) -> Iterator[Row]:
    shape = (8, 16, 9, 8) if small else (8, 64, 56, 56)
    levels = SMALL["five levels"] if small else LEVELS
    made: dict[str, tuple[torch.nn.Module, Any]] = {name: (make(*shape[:2])[0], shape) for name, make in LAYERS.items()}
    for choice in ("shared", "per_domain"):
        made[f"five levels, {choice}"] = (
            dn.DomainBatchNorm(levels[0][1], num_domains=5, sgd_statistics=choice, population_statistics=choice),
            levels,
        )
    for name, (layer, shapes) in made.items():
        several = isinstance(shapes[0], tuple)
        xs = [
            torch.randn(s).to(device, dtype, memory_format=LAYOUTS[layout]).requires_grad_()
            for s in (shapes if several else [shapes])
        ]
        layer.to(device)

        def run(layer: Any = layer, xs: list[Tensor] = xs, several: bool = several) -> None:
            ys = layer(xs) if several else [layer(xs[0])]
            torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])

        taken = used_by(run)
        # A plain BatchNorm of each tensor is torch's own; in channels_last there are eager operations only.
        plain = name == "BN" or name.endswith("per_domain")
        fastest = "torch" if plain else FASTEST.get(device) if layout == "NCHW" else "eager"
        expected = fastest if device in FASTEST else taken
        yield {
            "layer": name,
            "type": _name(dtype),
            "layout": layout,
            "taken": taken,
            "passed": taken == expected,
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
