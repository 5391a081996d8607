"""One run of the study classification.py: its data, model, training and measurements."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import domainnorm as dn
from domainnorm.data import ClassificationDataset
from domainnorm.data.arrays import read_idx_pair
from domainnorm.data.class_sampler import ClassBatchSampler
from domainnorm.surgery.freeze import freeze_batchnorm

DEBIAN = "/usr/share/datasets/fashion-mnist"  # where its package dataset-fashion-mnist lies
WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # the α of which validation chooses one
POINTS = 9  # of a curve
SWEEP = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 0.9, 0.97, 1.0)  # those of the section on α
Watch = Callable[[nn.Module, float], None]
Split = tuple[Tensor, Tensor]  # images (N, 1, H, W), labels (N,)


@dataclass(frozen=True)
class Run:
    """One training run; the fields are all it depends on, beside the settings of the study."""

    norm: str
    batch: int
    options: dict[str, Any] = field(default_factory=dict)
    pattern: tuple[str, int] = ("iid", 0)
    freeze: bool = False  # the statistics, from half-way on
    decay: tuple[float, float] | None = None  # of γ and β: strength, and the value to which γ decays; None: as weights
    part: int = 1  # of the images, one in so many
    times: int = 1  # as many epochs
    rate: float | None = None  # None: that of the study
    curve: bool = False  # accuracies over training, too

    def key(self, seed: int) -> str:
        """What is not the default, and the seed."""
        default = asdict(Run("", 0))
        given = {k: v for k, v in asdict(self).items() if v != default[k]}
        return json.dumps(given | {"seed": seed}, ensure_ascii=False)


def read_data(name: str, validation: int, test: int) -> dict[str, Split]:
    """Splits "train" (all but the last), "val" and "test", in random but fixed order, at half resolution."""
    if name == "patches":
        parts = [ClassificationDataset(f"patches_{part}") for part in ("train", "val")]
        grey = [torch.from_numpy(part.images).float() for part in parts]
        read = [(x.mean(3) if x.ndim == 4 else x, part.labels) for x, part in zip(grey, parts, strict=True)]
    else:
        files = [(f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k")]
        parts = [read_idx_pair(*(Path(name) / file for file in pair)) for pair in files]
        read = [(torch.from_numpy(part.images.copy()).float(), torch.from_numpy(part.labels)) for part in parts]
    orders = [torch.randperm(len(y), generator=torch.Generator().manual_seed(0)) for _, y in read]
    (x, y), (tx, ty) = [(F.avg_pool2d(x[o].unsqueeze(1), 2), y[o]) for (x, y), o in zip(read, orders, strict=True)]
    x, tx = ((v - x.mean()) / x.std() for v in (x, tx))
    cut = len(y) - validation
    return {"train": (x[:cut], y[:cut]), "val": (x[cut:], y[cut:]), "test": (tx[:test], ty[:test])}


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)),
        )
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Identity() if (before, stride) == (width, 1) else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def make_model(classes: int) -> nn.Module:
    """Six convolutions with BatchNorm, 16 or 64 channels."""
    stem = (nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
    return nn.Sequential(*stem, Block(16, 16, 1), Block(16, 64, 2), *head)


def batch_group_norms(model: nn.Module, image: Tensor, num_groups: int) -> nn.Module:
    """Each layer gets as many pieces as divide its features, the number nearest to `num_groups`."""
    sizes: dict[str, int] = {}  # D of each layer
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: sizes.update({name: inputs[0][0].numel()}))
        for name, layer in layers.items()
    ]
    model.eval()(image)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        divisors = (d for d in range(1, sizes[name] + 1) if sizes[name] % d == 0)
        pieces = min(divisors, key=lambda d: abs(d - num_groups))
        model.set_submodule(name, dn.convert_batchnorm(layer, "BGN", num_groups=pieces))
    return model


def minibatches(labels: Tensor, size: int, pattern: tuple[str, int], seed: int) -> Iterator[Tensor]:
    """Indices without end: one permutation after another, or as `ClassBatchSampler` makes them."""
    if pattern[0] != "iid":
        options = {
            "batches": pattern[0],
            "classes_per_batch": pattern[1],
            "with_replacement": False,
        }  # different classes
        made = ClassBatchSampler(labels.numpy(), size, **options, seed=seed)
        yield from (torch.tensor([index for index, _ in batch]) for batch in made)
    generator, left = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(len(labels), generator=generator)])
        yield left[:size]
        left = left[size:]


def train(run: Run, data: Split, epochs: int, rate: float, seed: int, watch: Watch | None = None) -> nn.Module:
    """SGD; the learning rate is proportional to the batch size, rises over 5 % of the steps and falls to 0.

    `watch` is called `POINTS` times, with the model and its accuracy on the minibatches since it was called last.
    """
    images, labels = data
    rate = run.rate or rate
    steps = max(len(labels) * epochs * run.times // run.batch, 2)
    options = dict(run.options)
    if run.norm == "BRN":  # the paper's schedule, 5k, 25k and 40k steps of 130k, as shares
        options |= {"r_max": [(0.04 * steps, 1), (0.3 * steps, 3)], "d_max": [(0.04 * steps, 0), (0.2 * steps, 5)]}
    torch.manual_seed(seed)
    model = make_model(int(labels.max()) + 1)
    if run.norm == "BGN":
        model = batch_group_norms(model, images[:1], **options)
    else:
        model = dn.convert_batchnorm(model, run.norm, **options)
    affine = [p for m in model.modules() if isinstance(m, dn.DomainBatchNorm) for p in (m.weight, m.bias)]
    strength, target = run.decay or (0.0, 0.0)
    apart = affine if run.decay else []
    others = [p for p in model.parameters() if all(p is not q for q in apart)]
    optimizer = torch.optim.SGD(others, rate, momentum=0.9, weight_decay=5e-4)
    if apart:
        optimizer.add_param_group({"params": apart, "weight_decay": 0.0})
    model.train()
    right = count = 0
    for step, chosen in enumerate(islice(minibatches(labels, run.batch, run.pattern, seed), steps)):
        if run.freeze and step == steps // 2:
            model = freeze_batchnorm(model, train_affine=True)
        for group in optimizer.param_groups:
            group["lr"] = rate * run.batch / 128 * min(1, (step + 1) / (0.05 * steps)) * (1 - step / steps)
        optimizer.zero_grad()
        logits = model(images[chosen])
        F.cross_entropy(logits, labels[chosen]).backward()
        for k, p in enumerate(apart):  # γ, β, γ, β, …
            p.grad.add_(p.detach() - (0 if k % 2 else target), alpha=strength)
        optimizer.step()
        right, count = right + int((logits.argmax(1) == labels[chosen]).sum()), count + len(chosen)
        if watch and (step + 1) * POINTS // steps > step * POINTS // steps:
            watch(model, 100 * right / count)
            right = count = 0
    return model


def follow(curve: list[dict[str, float]], run: Run, test: Split, model: nn.Module, accuracy: float) -> None:
    """A point of a curve: accuracies on training minibatches, under the EMA and, of odd minibatches, on such ones."""
    point = {"training": round(accuracy, 3), "EMA": score(model, test)[0]}
    if run.pattern[0] != "iid":
        point["equal minibatches"] = minibatch_score(model, test, run.batch, run.pattern)
    curve.append(point)
    model.train()


@torch.no_grad()
def score(model: nn.Module, split: Split, batches: list[Tensor] | None = None) -> tuple[float, float]:
    """Accuracy in percent and cross-entropy, over `batches` of indices (by default all images)."""
    model.eval()
    images, labels = split
    batches = list(torch.arange(len(labels)).split(250)) if batches is None else batches
    count, right, loss = sum(len(b) for b in batches), 0, 0.0
    for batch in batches:
        logits = model(images[batch])
        right += int((logits.argmax(1) == labels[batch]).sum())
        loss += float(F.cross_entropy(logits, labels[batch], reduction="sum"))
    return round(100 * right / count, 3), round(loss / count, 5)


def minibatch_score(model: nn.Module, split: Split, size: int, pattern: tuple[str, int]) -> float:
    """Accuracy under minibatch statistics, of about as many images as there are."""
    dn.set_statistics(model, "minibatch")
    batches = list(islice(minibatches(split[1], size, pattern, seed=0), max(len(split[1]) // size, 1)))
    accuracy = score(model, split, batches)[0]
    dn.set_statistics(model, "auto")
    return accuracy


def measure(run: Run, model: nn.Module, data: dict[str, Split], trained: Split, sweep: bool) -> dict[str, Any]:
    """Test accuracies: under the EMA, with α chosen in validation, of minibatches, under recomputed statistics.

    `trained` are the images whose statistics are recomputed; with `sweep`, accuracy and cross-entropy for each α too.
    """
    result: dict[str, Any] = {"EMA": score(model, data["test"])[0]}
    number = len(trained[0])
    batches = trained[0].tensor_split(max(number // 128, 1))  # of 128 or a few more: no remainder below a ghost size
    recompute: Callable[[], Any] = partial(dn.recompute_population_statistics, model, batches, number, progress=False)
    if run.norm == "GN" and sweep:
        dn.convert_groupnorm(model)
        recompute()
    if sweep:
        result["sweep"] = [score(dn.set_example_weight(model, w), data["test"]) for w in SWEEP]
    if run.norm == "GN":
        return result
    scores = dn.choose_example_weight(model, lambda m: score(m, data["val"])[0], WEIGHTS)
    chosen = max(scores, key=lambda w: scores[w])
    result |= {"validation": scores[0.0], "α": chosen, "with α": score(model, data["test"])[0]}
    dn.set_example_weight(model, 0.0)
    if run.norm == "BN" and run.pattern[0] != "iid" and not run.freeze:
        for name, pattern in (("equal minibatches", run.pattern), ("random minibatches", ("iid", 0))):
            result[name] = minibatch_score(model, data["test"], run.batch, pattern)
    if not run.freeze:
        recompute()
        result["recomputed"] = score(model, data["test"])[0]
    return result
