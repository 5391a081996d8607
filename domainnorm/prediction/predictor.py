"""A trained model, from images of any kind to what is in them."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision import tv_tensors

from ..config import load_config
from ..data.image import of_this_image
from ..data.transforms import classifier_test_transforms, test_transforms
from ..distributed import get_device
from ..engine.checkpoint import config_in, last_checkpoint
from ..errors import UserError
from ..evaluation.in_domain import Nearest
from ..modeling import build_model
from ..modeling.checkpoint_file import read_checkpoint
from ..modeling.fast import FastModel, computes_in_bfloat16
from ..paths import user_path
from ..statistics.choose import set_statistics
from ..surgery.domains import with_domains
from ..surgery.resize_domains import keep_domain, merge_domains
from .inputs import Source, find_images, is_one
from .prediction import Prediction

UNSURE = 0.5  # what objects score more than that are kept where nothing else is said


class Predictor:
    """A trained detector or classifier that predicts from images of any kind.

    The predictions for an image do not depend on the other images or on the batch size.

    Args:
        weights: the folder of a run, whose last checkpoint is used, or a checkpoint.
        statistics: which normalize: `"population"` or `"minibatch"`.
        domain: if data sets are the domains of norms: number or name of the images' domain; None: chosen as
            `TEST.DOMAIN` says, if that is `nearest` or `average`.
        score: objects with a higher score are kept. Or a dict of the lowest scores to keep by class name, such as the
            best ones in a run's `thresholds.json`; for other classes, objects above 0.5 are kept.
        batch_size: number of images that are read, and passed to the model, together. A detector processes them one by
            one.
        exact: give the results of `dn.evaluate`, to the bit. Otherwise norms are folded into convolutions (`dn.fuse`)
            under population statistics, memory is channels_last, and convolutions run in bfloat16 where the device
            supports it: faster, with differences from rounding.
        config_file: config of the model; None: the one in the checkpoint.
        options: KEY, VALUE, …, which override the config, such as `["INPUT.MIN_SIZE_TEST", 640]`.

    Attributes:
        cfg: the config.
        model: the model that predicts.
        file: the checkpoint.
        class_names: the name of each label.

    Raises:
        UserError: the checkpoint does not exist or has no config, or the options do not fit the model.

    Example::

        >>> predict = dn.Predictor("output/run")  # doctest: +SKIP
        >>> found = predict("photo.jpg")  # doctest: +SKIP
        >>> found.boxes, found.scores, found.names  # doctest: +SKIP
        >>> for found in predict.stream("folder"):  # doctest: +SKIP
        ...     print(found)
        folder/1.jpg: 12 RBC, 1 WBC, 62 ms
    """

    def __init__(
        self,
        weights: str | Path,
        *,
        statistics: str = "population",
        domain: int | str | None = None,
        score: float | Mapping[str, float] = UNSURE,
        batch_size: int = 1,
        exact: bool = False,
        config_file: str | Path | None = None,
        options: Sequence[Any] = (),
    ) -> None:
        if statistics not in ("population", "minibatch"):
            raise UserError(f"statistics takes one of ['population', 'minibatch'], got {statistics!r}")
        for value in score.values() if isinstance(score, Mapping) else [score]:
            if not 0 <= value <= 1:
                raise UserError(f"score takes a number from 0 to 1, got {value:g}")
        if batch_size < 1:
            raise UserError(f"batch_size takes 1 or more, got {batch_size}")
        self.file = checkpoint_of(weights)
        self.cfg = config_of(self.file, config_file, options)
        self.batch_size = batch_size
        self.device = get_device(self.cfg.MODEL.DEVICE)
        model = build_model(self.cfg, trained=True).eval()
        description: Any = model.description
        number = range(description["num_classes"])
        self.class_names: list[str] = description["class_names"] or [f"class {label}" for label in number]
        self._above = _thresholds(score, self.class_names).to(self.device)
        try:
            self.model = self._prepared(model, statistics, domain, exact)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.file}: {error}") from error
        self.is_classifier = self.cfg.MODEL.META_ARCHITECTURE == "Classifier"
        self._transform = (classifier_test_transforms if self.is_classifier else test_transforms)(self.cfg)

    def __call__(self, inputs: Any) -> Prediction | list[Prediction]:
        """Predict for one image; for a folder, a pattern or a list of inputs, return a list with one item per image.

        Args:
            inputs: the path of an image file or a folder, a pattern such as `"frames/*.png"`, a PIL image, an RGB array
                (uint8), a tensor (uint8, or floats in [0, 1]), or a list of these. Files and PIL images are turned
                upright according to EXIF.

        Shape:
            - arrays: :math:`(H, W, 3)`
            - tensors: :math:`(3, H, W)`

        Raises:
            UserError: for the first input that is unknown or broken.
        """
        found = list(self.stream(inputs))
        return found[0] if is_one(inputs) else found

    @torch.no_grad()
    def stream(self, inputs: Any, failed: Callable[[UserError], None] | None = None) -> Iterator[Prediction]:
        """Yield the predictions for one image after the other, for inputs that do not fit in memory.

        Args:
            inputs: as for a call.
            failed: called with the error of each input that cannot be used; None: the error is raised.
        """
        images = self._read(inputs, failed)
        while batch := list(itertools.islice(images, self.batch_size)):
            yield from self._predict([source.name for source, _ in batch], [image for _, image in batch])

    def _read(self, inputs: Any, failed: Callable[[UserError], None] | None) -> Iterator[tuple[Source, Tensor]]:
        for source in find_images(inputs):
            try:
                if isinstance(source, UserError):
                    raise source
                image = source.read(self._white)
            except UserError as error:
                if failed is None:
                    raise
                failed(error)
            else:
                yield source, image

    def _white(self, values: np.ndarray) -> float:
        return self.cfg.INPUT.MAX_INTENSITY or of_this_image(values)

    def _predict(self, names: list[str], images: list[Tensor]) -> Iterator[Prediction]:
        ready = [self._transform(tv_tensors.Image(image)).as_subclass(Tensor).float() for image in images]
        began = time.perf_counter()
        outputs = self.model([image.to(self.device) for image in ready])
        found = self._likeliest(outputs) if self.is_classifier else [self._kept(output) for output in outputs]
        seconds = (time.perf_counter() - began) / len(images)
        for name, image, one in zip(names, images, found, strict=True):
            scores, labels = one["scores"], one["labels"]
            yield Prediction(name, image, scores, labels, one.get("boxes"), one.get("masks"), seconds, self.class_names)

    def _kept(self, output: dict[str, Tensor]) -> dict[str, Tensor]:
        chosen = output["scores"] > self._above[output["labels"]]
        found = {key: value[chosen] for key, value in output.items()}
        if "masks" in found:
            found["masks"] = found["masks"][:, 0] >= 0.5
        return {key: value.cpu() for key, value in found.items()}

    def _likeliest(self, logits: Tensor) -> list[dict[str, Tensor]]:
        scores, labels = logits.float().softmax(1).cpu().sort(dim=1, descending=True, stable=True)
        return [{"scores": s, "labels": k} for s, k in zip(scores, labels, strict=True)]

    def _prepared(self, model: nn.Module, statistics: str, domain: int | str | None, exact: bool) -> nn.Module:
        """The model as it is to predict."""
        choice = self.cfg.TEST.DOMAIN
        if domain is not None:
            names = self.cfg.DATASETS.DOMAINS
            is_number = isinstance(domain, str) and domain.isdecimal() and domain not in names
            keep_domain(model, int(domain) if is_number else domain)
        elif choice == "average" and with_domains(model):
            merge_domains(model)
        elif choice == "given" and (layers := with_domains(model)):
            known = next((list(layer.domain_names) for layer in layers.values() if layer.domain_names), "0, 1, …")
            raise UserError(
                f"norms of the model have domains: say which the images are of, of {known}; or set TEST.DOMAIN to "
                "nearest or average"
            )
        set_statistics(model, statistics)
        nearest = bool(with_domains(model))
        if not exact:
            model = FastModel(model, float(self._above.min()), bfloat16=computes_in_bfloat16(self.device))
        return Nearest(model) if nearest else model


def _thresholds(score: float | Mapping[str, float], class_names: Sequence[str]) -> Tensor:
    """What objects of each class have to score more than, `(num_classes,)`."""
    if not isinstance(score, Mapping):
        return torch.full((len(class_names),), float(score))
    if unknown := [name for name in score if name not in class_names]:
        raise UserError(f"score takes names of the model's classes, {list(class_names)}, got {unknown[0]!r}")
    least = torch.tensor([score.get(name, math.nan) for name in class_names])
    return least.nextafter(least.new_tensor(-1)).nan_to_num(UNSURE)


def checkpoint_of(weights: str | Path) -> Path:
    """A checkpoint, or the last one of a run's folder."""
    path = user_path(os.fspath(weights))
    if not path.is_dir():
        return path
    file = last_checkpoint(path)
    if file is None:
        raise UserError(f"{weights}: holds no checkpoint: expected the folder of a run, or a checkpoint file")
    return file


def config_of(file: Path, config_file: str | Path | None, options: Sequence[Any]) -> CfgNode:
    """What the checkpoint was trained with, or `config_file`, with `options`."""
    pairs: list[Any] = []
    if config_file is None:
        content = read_checkpoint(file)
        if "config" not in content:
            raise UserError(f"checkpoint {file}: holds no config: name the model's, by --config-file or config_file=")
        pairs = [word for pair in config_in(content["config"], file).items() for word in pair]
    return load_config(config_file, [*pairs, *options, "MODEL.WEIGHTS", str(file)])
