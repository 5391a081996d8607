"""Population statistics of a whole model, recomputed from a fixed one."""

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..distributed import gather_objects, rank, world_size
from ..distributed.roi_shuffle import RoIShuffle
from ..layers import BatchGroupNorm, DomainBatchNorm
from ..layers.inputs import LayerInput
from ..ops.formula import Normalization
from ..ops.moments import Moments
from ..ops.normalize import domain_moments
from .batches import batch_size, regrouped
from .estimators import Estimate, Layer, MeanOfVariances, Pooled, is_shared, ranks_of, write
from .lockstep import OutOfStepError, barrier_exchange, register_tensors, run_lockstep
from .offload import ActivationOffloader
from .preserve import preserve_state

METHODS = ("pooled", "mean_of_variances", "exact")


@torch.no_grad()
def recompute_population_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    num_samples: int = 10_000,
    method: str = "pooled",
    *,
    samples_per_batch: int | None = None,
    keep_groups: bool = False,
    live: int | None = None,
    folder: str | Path | None = None,
    as_in_inference: Sequence[nn.Module] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Recompute the running statistics of every BatchNorm from data, with the model's current weights.

    This is PreciseBN (*Rethinking "Batch"*, §3), for layers of this library and of torch. The model runs in training
    mode: RoIs are sampled, dropout is active. If the model already is in training mode, layers in eval mode stay so and
    keep their statistics, as do frozen layers and layers that no batch reaches. Only the buffers change, in place, at
    the very end: if anything raises, the model is as before. The old statistics have no influence: Batch Renorm
    normalizes with r = 1 and d = 0.

    Every rank calls it with its own batches and gets the statistics of all. If layers are synchronized or RoIs are
    shuffled, all ranks stop as soon as one has no batch left.

    Args:
        model: called as `model(batch)`; its output is not used.
        batches: any iterable of batches of B samples; unless `method` is `"exact"`, a larger B is better (the paper: B
            ≥ 100).
        num_samples: stop after the batch with which all ranks together reach this number; earlier if `batches` ends.
        method: `"pooled"` (Eq. 2): merge the moments of all batches by their true counts, with Bessel's correction for
            the total. `"mean_of_variances"` (Eq. 3): average the batches' means and their unbiased variances. `"exact"`
            (App. A.3): as if the population were one batch, for any B: each layer normalizes by the statistics of all
            batches. It takes one pass and holds all batches in memory between two layers. A model that keeps tensors in
            its attributes from one layer to a later one would mix up its batches. Every batch occupies a thread until
            all are done (on a CPU with its OpenMP team: thousands need `OMP_NUM_THREADS=1`).
        samples_per_batch: B, if `batches` have another size: tensors `(N, …)`, lists of samples, and tuples, lists and
            dicts of these are split and joined. None: use the batches as they are.
        keep_groups: whether layers that split the batch in training (GhostBN, SeqNorm, GBGN, micro-batches of Batch
            Renorm) normalize their groups instead of the whole batch of B. Either way the statistics are over all
            samples.
        live: for `"exact"`: how many batches may have their tensors on the device at once; None: all.
        folder: for `"exact"` with `live`: where the other batches' tensors go, as memory-mapped files; None: host
            memory.
        as_in_inference: layers to recompute while the rest of the model is in eval mode, for batches of images only.
            None: all layers, with the model in training mode.
        progress: whether rank 0 shows a progress bar with the remaining time.

    Returns:
        The model.

    Raises:
        ValueError: unknown method, no batch (for `"exact"`: on some rank) or no sample, numbers that are not finite, or
            no layer to recompute.
        OutOfStepError: with `"exact"`, if the model runs its layers in a different order for different batches.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        >>> batches = [torch.randn(100, 3, 8, 8) for _ in range(4)]
        >>> model = dn.recompute_population_statistics(model, batches, num_samples=400, progress=False)
    """
    if method not in METHODS:
        raise ValueError(f"method takes one of {list(METHODS)}, got {method!r}")
    if samples_per_batch is not None:
        if samples_per_batch < 1:
            raise ValueError(f"samples_per_batch takes a positive number, got {samples_per_batch}")
        batches = regrouped(batches, samples_per_batch)
    share = math.ceil(num_samples / world_size())
    found = model
    if isinstance(model, DistributedDataParallel):
        model = model.module  # whose forwards need not be as many on every rank
    with preserve_state(model):
        _forget_old_statistics(model, keep_groups)
        if as_in_inference is not None:
            model.eval()
            for layer in as_in_inference:
                layer.train()
        elif not model.training:
            model.train()
        layers = {name: layer for name, layer in model.named_modules() if _follows_batches(layer)}
        if not layers:
            raise ValueError("the model has no BatchNorm in training mode that keeps running statistics")
        if method == "exact":
            offloader = None if live is None else ActivationOffloader(model, live, folder)
            estimates = _exact(model, layers, batches, share, offloader, progress)
        else:
            estimates = _from_minibatches(model, layers, batches, share, method, progress)
        sizes = {name: getattr(layer, "feature_size", None) for name, layer in layers.items()}
    _check_estimates(estimates)
    for name, estimate in estimates.items():
        write(layers[name], *estimate)
        if isinstance(layer := layers[name], BatchGroupNorm):
            layer.feature_size = sizes[name]
    return found


def _check_estimates(estimates: Mapping[str, Estimate]) -> None:
    """ValueError if they are of no sample at all, or not finite: nothing is written then."""
    if not any(count.any() for count, *_ in estimates.values()):
        raise ValueError("the batches have no sample to recompute statistics from")
    for name, (count, mean, _, biased) in estimates.items():
        if not all(torch.where(count > 0, value, 0).isfinite().all() for value in (mean, biased)):
            raise ValueError(f"the statistics of {name} are not finite: the batches, or the weights, hold NaN or inf")


def _forget_old_statistics(model: nn.Module, keep_groups: bool) -> None:
    """Batch Renorm is not corrected any more, and layers do not split the batch.

    Groups of one sample stay, as they look at no batch. With `keep_groups` all do, and a batch may be smaller than
    they: the last one often is.
    """
    for layer in model.modules():
        if isinstance(layer, DomainBatchNorm):
            layer.is_corrected = False
            groups = layer.sample_groups
            is_of_samples = groups is not None and groups.size == 1
            layer.sample_groups = copy.copy(groups) if keep_groups or is_of_samples else None
            if layer.sample_groups is not None:
                layer.sample_groups.allow_smaller_batch = True
                layer.sample_groups.allow_single_element = is_of_samples


def _from_minibatches(
    model: nn.Module, layers: dict[str, Layer], batches: Iterable[Any], share: int, method: str, progress: bool
) -> Mapping[str, Estimate]:
    """Each batch normalized by itself, as in training."""
    sums = {name: Pooled(layer) if method == "pooled" else MeanOfVariances(layer) for name, layer in layers.items()}
    in_step = _shuffles(model) or any(ranks_of(layer) is not None for layer in layers.values())
    with _observed(layers, lambda name, moments: sums[name].add(moments)):
        number = sum(_forward(model, batch) for batch in _taken(batches, share, in_step, progress))
    if not sum(gather_objects(number)):
        raise ValueError("there is no batch to recompute statistics from")
    return {name: of_layer.finish() for name, of_layer in sums.items()}


def _exact(
    model: nn.Module,
    layers: dict[str, Layer],
    batches: Iterable[Any],
    share: int,
    offloader: ActivationOffloader | None,
    progress: bool,
) -> Mapping[str, Estimate]:
    """All batches in step; a layer normalizes by its buffers, which are set when all are there."""
    totals: dict[str, Moments] = {}

    def combine(name: str, values: list[tuple[Tensor, Tensor, Tensor]]) -> list[None]:
        _same_on_all_ranks(f"at {name}")
        parts = Moments(*(torch.stack(part) for part in zip(*values, strict=True))).merge(0)[0]
        merged = parts.merge_ranks(None) if world_size() > 1 else parts
        write(layers[name], merged.count, merged.mean, merged.var, merged.var)
        totals[name] = totals[name] + merged if name in totals else merged  # a layer that is reached several times
        bar.update()
        return [None] * len(values)

    def observe(name: str, moments: Moments) -> None:
        own = moments.merge(0) if is_shared(layers[name]) else moments
        barrier_exchange(name, (own.count, own.mean, own.var))

    for layer in layers.values():
        if isinstance(layer, DomainBatchNorm):
            layer.statistics = "population"
        else:
            layer.eval()
    taken = _taken(batches, share, _shuffles(model), progress)
    first = list(itertools.islice(taken, 1))
    if without := [r for r, has in enumerate(gather_objects(bool(first))) if not has]:
        raise ValueError(f"method 'exact' needs a batch on every rank, there is none on {without}")

    def forward(batch: Any) -> None:
        register_tensors(batch)
        model(batch)

    forwards = (partial(forward, batch) for batch in itertools.chain(first, taken))
    with _observed(layers, observe), tqdm(total=len(layers), desc="layers", disable=_silent(progress)) as bar:
        run_lockstep(forwards, combine, offloader)
        _same_on_all_ranks("finished")
    return {name: (total.count, total.mean, total.unbiased_var(), total.var) for name, total in totals.items()}


def _shuffles(model: nn.Module) -> bool:
    """Whether a forward has collectives of its own, so that the ranks must run as many."""
    return world_size() > 1 and any(isinstance(module, RoIShuffle) for module in model.modules())


def _same_on_all_ranks(place: str) -> None:
    if len(set(places := gather_objects(place))) > 1:
        raise OutOfStepError(f"the ranks are {places}: exact statistics need a model that runs its layers in one order")


def _follows_batches(module: nn.Module) -> bool:
    """Whether it normalizes by minibatches in training and keeps running statistics of them."""
    if not isinstance(module, Layer) or not module.training or module.running_mean is None:
        return False
    return not isinstance(module, DomainBatchNorm) or module.statistics != "population"


@contextmanager
def _observed(layers: dict[str, Layer], observe: Any) -> Iterator[None]:
    """`observe(name, moments)` with the moments, in float64, of each normalization batch that the statistics count:
    of the domains, `(K, C)`, or `(1, C)` where the SGD and the population statistics both are shared.
    """

    def merged(moments: Moments, one: bool = False) -> Moments:
        return moments.double().merge(0) if one else moments.double()

    for name, layer in layers.items():
        if isinstance(layer, DomainBatchNorm) and layer.batch_hook is not None:
            raise ValueError(f"{name} has a batch_hook already (within a virtual batch?): remove it first")
    handles = []
    for name, layer in layers.items():
        if isinstance(layer, DomainBatchNorm):
            one = layer.sgd_statistics == "shared" and is_shared(layer)
            layer.batch_hook = lambda layer, inputs, name=name, one=one: observe(
                name, merged(layer.moments_of_domains(inputs), one)
            )
        else:

            def hook(layer: Any, args: Any, kwargs: Any, name: str = name) -> None:
                x = args[0] if args else kwargs["input"]
                observe(name, merged(_moments_of_torch(LayerInput.of(x, None, 1, layer.num_features))))

            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for layer in layers.values():
            if isinstance(layer, DomainBatchNorm):
                layer.batch_hook = None
        for handle in handles:
            handle.remove()


def _moments_of_torch(inputs: LayerInput) -> Moments:
    """The moments `(1, C)` of the input of a layer of torch."""
    segments, domains, _ = inputs.segmentation()
    return domain_moments(Normalization(inputs.tensors, segments, inputs.domains, domains, None, None, eps=0.0))


def _taken(batches: Iterable[Any], share: int, in_step: bool, progress: bool) -> Iterator[Any]:
    """Batches until `share` samples are reached; with `in_step`, until some rank has no more."""
    iterator, taken = iter(batches), 0
    with tqdm(total=share, desc="samples", disable=_silent(progress)) as bar:
        while True:
            batch = list(itertools.islice(iterator, 1)) if taken < share else []
            if not (all(gather_objects(bool(batch))) if in_step else batch):
                return
            yield batch[0]
            number = batch_size(batch[0])
            taken += number
            bar.update(number)


def _silent(progress: bool) -> bool | None:
    return None if progress and rank() == 0 else True  # None: only where somebody looks


def _forward(model: nn.Module, batch: Any) -> int:
    """Lets go of what the model returns; 1, to count."""
    model(batch)
    return 1
