"""Faults of training: small batches, numerics, frozen layers, accumulation, checkpointing, averages, decay."""

from typing import Any

import audit_training as training
import torch
from audit_models import Plain, Regions
from audit_variants import Fault, Given, Variant, norms_of
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision.ops import FrozenBatchNorm2d

import domainnorm as dn


def small_batches(v: Variant, planted: bool) -> Given:
    """One or two images in a normalization batch, and 16."""
    batch = (1 + v.k % 2) if planted else 16
    model = training.train(v.model(), training.classify(batch, v.size), 120, 0.02 if batch > 2 else 0.002)
    return Given(model, training.batches(16, batch, v.size))


def regions_of_one_image(v: Variant, planted: bool) -> Given:
    """RoIs of one image, and of eight."""
    batch = 1 if planted else 8
    model = training.train(Regions(v.width), training.classify(batch, 16), 120, 0.02)
    return Given(model, training.batches(16, batch, 16), layers=("head.1",))


def few_elements(v: Variant, planted: bool) -> Given:
    """BatchNorm after global pooling with 4 to 6 images, and with 32."""
    batch = 4 + v.k // 2 if planted else 32
    model = nn.Sequential(
        nn.Conv2d(3, v.width, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(v.width), nn.Flatten()
    ).append(nn.Linear(v.width, training.CLASSES))
    training.train(model, training.classify(batch, 16), 120)
    return Given(model, training.batches(16, batch, 16), layers=("2",))


def last_batch(v: Variant, planted: bool) -> Given:
    """An epoch whose last batch is one image, and one without it."""
    return Given(v.trained(), [*v.batches(), *(training.batches(1, 1, v.size) if planted else [])])


def empty_batches(v: Variant, planted: bool) -> Given:
    """Batches of images without any object, and with one each."""
    model = training.train(Regions(v.width), training.classify(8, 16), 120)
    counts = [[0] * 8 if planted and k % 4 == 1 else [4] * 8 for k in range(8)]
    return Given(model, [(x, c) for x, c in zip(training.batches(8, 8, 16), counts, strict=True)], layers=("head.1",))


def half_statistics(v: Variant, planted: bool) -> Given:
    """A model and its statistics in half precision, and under autocast."""
    dtype = (torch.bfloat16, torch.float16)[v.k // 2 % 2]
    model = v.trained()
    if planted:
        return Given(model.to(dtype), [x.to(dtype) for x in v.batches()])
    return Given(model, v.batches(), {"forward": lambda model, x: _autocast(model, x, torch.bfloat16)})


def _autocast(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Any:
    with torch.autocast("cpu", dtype):
        return model(x)


def overflow(v: Variant, planted: bool) -> Given:
    """Values beyond 65504 under autocast to float16, and to bfloat16."""
    model = Plain(v.width)
    model.blocks[1][0].weight.data *= 4e5  # type: ignore[index, union-attr, operator]
    training.train(model, training.classify(v.batch, 16), 120, 0.001)
    dtype = torch.float16 if planted else torch.bfloat16
    return Given(
        model, training.batches(8, v.batch, 16), {"forward": lambda m, x: _autocast(m, x, dtype)}, ("blocks.1.1",)
    )


def nan_in_statistics(v: Variant, planted: bool) -> Given:
    """A NaN, an infinity or a negative variance in one layer's statistics, and none."""
    model = v.trained()
    name, layer = norms_of(model)[1 + v.k % 2]
    if planted:
        layer.running_var[0] = (float("nan"), float("inf"), -1.0)[v.k % 3]  # type: ignore[index, operator]
    return Given(model, v.batches(), layers=(name,))


def nan_in_input(v: Variant, planted: bool) -> Given:
    """An image with a NaN, and none."""
    batches = v.batches()
    if planted:
        batches[v.k][0, 0, 0, 0] = (float("nan"), float("inf"))[v.k // 2 % 2]
    model = v.trained()
    return Given(model, batches, layers=(norms_of(model)[0][0],))


def large_mean(v: Variant, planted: bool) -> Given:
    """A bias that a norm takes away again, so large that rounding eats the rest; and none."""
    model = Plain(v.width, bias=True)
    if planted:
        model.blocks[1][0].bias.data += (1e6, 3e2)[v.k // 2 % 2]  # type: ignore[index, union-attr, operator]
    training.train(model, training.classify(v.batch, 16), 150)
    half = {"forward": lambda m, x: _autocast(m, x, torch.bfloat16)} if v.k // 2 % 2 else {}
    return Given(model, training.batches(8, v.batch, 16), half, ("blocks.1.1",))


def dead_channels(v: Variant, planted: bool) -> Given:
    """Channels that are the same everywhere, and living ones."""
    model = Plain(v.width)
    if planted:
        weight = model.blocks[1][0].weight  # type: ignore[index, union-attr]
        weight.data[: weight.shape[0] * (1 + v.k % 2) // 3] = 0  # type: ignore[index, operator, union-attr]
        weight.register_hook(lambda g: g * (weight != 0))  # type: ignore[union-attr, operator]
    training.train(model, training.classify(v.batch, 16), 120)
    model.blocks[1][0].weight._backward_hooks = None  # type: ignore[index, union-attr]
    return Given(model, training.batches(8, v.batch, 16), layers=("blocks.1.1",))


def large_eps(v: Variant, planted: bool) -> Given:
    """Inputs so small that eps is all that they are divided by, and an eps that fits."""
    norm = lambda c: nn.BatchNorm2d(c, eps=1e-3 if planted else 1e-9)  # noqa: E731
    model = Plain(v.width, norm)
    model.blocks[1][0].weight.data *= 3e-3 / (1 + v.k)  # type: ignore[index, union-attr, operator]
    model.blocks[1][0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    training.train(model, training.classify(v.batch, 16), 250)
    return Given(model, training.batches(8, v.batch, 16), layers=("blocks.1.1",))


def never_updated(v: Variant, planted: bool) -> Given:
    """FrozenBatchNorm2d without weights, or BatchNorm in eval mode from the first step; and trained, then frozen."""
    if planted and v.k // 2 % 2:
        return Given(v.train(v.model(FrozenBatchNorm2d), 20), v.batches())
    model = v.model() if planted else v.trained()
    for _, layer in norms_of(model):
        layer.eval()
        layer.requires_grad_(False)
    return Given(v.train(model, 20, 1e-4), v.batches())


def moving_statistics(v: Variant, planted: bool) -> Given:
    """Parameters frozen and the mode forgotten, and both."""
    model = v.trained()
    for _, layer in norms_of(model)[:2]:
        layer.requires_grad_(False)
        if not planted:
            layer.eval()
    return Given(v.train(model, 20, 1e-3), v.batches(), layers=tuple(name for name, _ in norms_of(model)[:2]))


def learning_parameters(v: Variant, planted: bool) -> Given:
    """Statistics frozen by eval() while the parameters learn, and both frozen."""
    model = v.trained()
    for _, layer in norms_of(model)[:2]:
        layer.eval()
        if not planted:
            layer.requires_grad_(False)
    return Given(v.train(model, 20, 1e-4), v.batches(), layers=tuple(name for name, _ in norms_of(model)[:2]))


def tiny_momentum(v: Variant, planted: bool) -> Given:
    """A fine-tuning on other images whose momentum is so small that their statistics never arrive; and 0.1."""
    model = v.trained()
    for _, layer in norms_of(model):
        layer.momentum = (1e-3, 3e-3, 5e-3)[v.k // 2] if planted else 0.1  # type: ignore[assignment]
        layer.num_batches_tracked.zero_()  # type: ignore[operator, union-attr]
    v.train(model, source=lambda step: 1.0)
    return Given(model, v.batches(8, 1.0))


def few_steps(v: Variant, planted: bool) -> Given:
    """Ten steps from the initial statistics, and eighty."""
    return Given(v.trained(10 + v.k if planted else 120), v.batches())


def accumulation(v: Variant, planted: bool) -> Given:
    """Gradients of four batches of 4, and of one of 16."""
    model = training.train(
        v.model(), training.classify(4 if planted else 16, v.size), 120, accumulate=4 if planted else 1
    )
    return Given(model, training.batches(16, 4 if planted else 16, v.size), {"accumulate": 4 if planted else 1})


def checkpointed(v: Variant, planted: bool) -> Given:
    """Activation checkpointing of some blocks, and of those whose layers update once."""
    model = Plain(v.width, nn.BatchNorm2d if planted or v.k // 2 % 2 else dn.DomainBatchNorm)
    model.checkpointed = {1} if v.k % 2 else {0, 1}
    if not planted and v.k // 2 % 2:
        model.checkpointed = set()
    layers = tuple(f"blocks.{k}.1" for k in model.checkpointed)
    return Given(
        training.train(model, training.classify(v.batch, 16), 120), training.batches(8, v.batch, 16), {}, layers
    )


def averaged(v: Variant, planted: bool) -> Given:
    """Averaged weights with the statistics of the first of them, and recomputed ones."""
    model = v.trained(60)
    average = AveragedModel(model)
    for _ in range(8):
        training.train(model, training.classify(v.batch, v.size), 20, 0.3)
        average.update_parameters(model)
    if not planted:
        update_bn(training.batches(40, v.batch, v.size), average)
    return Given(average, v.batches(16))


def decay(v: Variant, planted: bool) -> Given:
    """Weight decay of frozen parameters, and of those that learn."""
    model = v.trained()
    for _, layer in norms_of(model):
        layer.requires_grad_(False)
        layer.eval()
    parameters = [p for p in model.parameters() if planted or p.requires_grad]
    return Given(model, v.batches(), {"optimizer": torch.optim.SGD(parameters, 0.1, weight_decay=1e-4)})


FAULTS = {
    "one or two images a batch": Fault("batch_size", "few samples", small_batches, "batch_samples"),
    "RoIs of one image": Fault("batch_size", "few samples", regions_of_one_image, "batch_samples"),
    "few elements": Fault("batch_size", "few elements", few_elements, "batch_elements"),
    "a last batch of one image": Fault("batch_size", "one sample", last_batch),
    "empty batches": Fault("batch_size", "empty batch", empty_batches),
    "half-precision statistics": Fault("numerics", "half-precision statistics", half_statistics),
    "overflow in float16": Fault("numerics", "NaN", overflow),
    "NaN in statistics": Fault("numerics", "broken statistics", nan_in_statistics),
    "NaN in the input": Fault("numerics", "NaN", nan_in_input),
    "a large mean": Fault("numerics", "large mean", large_mean, "mean_over_std"),
    "dead channels": Fault("numerics", "dead channels", dead_channels, "dead_channels"),
    "variance far below eps": Fault("numerics", "dead channels", large_eps, "dead_channels"),
    "frozen, never updated": Fault("frozen", "never updated", never_updated, "drift"),
    "parameters frozen, statistics not": Fault("frozen", "parameters frozen, statistics not", moving_statistics),
    "statistics frozen, parameters not": Fault("frozen", "statistics frozen, parameters not", learning_parameters),
    "momentum too small": Fault("frozen", "unfinished average", tiny_momentum, "unfinished"),
    "too few steps": Fault("frozen", "unfinished average", few_steps, "unfinished"),
    "gradient accumulation": Fault("training", "accumulation", accumulation),
    "activation checkpointing": Fault("training", "updated twice", checkpointed),
    "averaged weights": Fault("training", "averaged weights", averaged, "drift"),
    "decay of frozen parameters": Fault("training", "decay without effect", decay),
}
