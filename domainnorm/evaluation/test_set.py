"""A data set of the config to evaluate on, and what a model scores there."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from ..data import domain_names, minibatch_loader, test_loader
from ..distributed import gather_objects, get_device, rank, world_size
from ..errors import UserError
from ..layers import DomainBatchNorm
from ..output import write_json
from .classification import accuracy, predict_classes, whole_minibatches
from .coco import evaluate_coco
from .coco import predict as predict_boxes
from .in_domain import in_domain
from .precision import MAX_DETECTIONS
from .tables import Scores

logger = logging.getLogger(__name__)


class TestSet:
    """One data set, opened and checked; every rank has its part of the images.

    Raises:
        UserError: what is wrong with it.
    """

    __test__ = False  # pytest

    def __init__(self, cfg: CfgNode, name: str) -> None:
        self.cfg = cfg
        self.device = get_device(cfg.MODEL.DEVICE)
        self.loader = test_loader(cfg, name, rank=rank(), world_size=world_size())
        self.classes = cfg.MODEL.META_ARCHITECTURE == "Classifier"
        self.predictions: list[dict[str, Any]] = []  # those scored last
        index = self.loader.domain
        self.domain = domain_names(cfg)[index] if index is not None and index >= 0 else ""
        if cfg.MODEL.NORM_DOMAINS and cfg.TEST.DOMAIN == "given" and not self.domain:
            raise UserError(
                f"TEST.DOMAIN 'given': the domain of {name} is not known; name it in DATASETS.TEST_DOMAINS, or set "
                "TEST.DOMAIN to nearest or average"
            )

    def scores(self, model: nn.Module, folder: Path | None = None) -> Scores:
        """The metrics of `model` in the mode it is in, the same on every rank; the predictions go to `folder`."""
        model = in_domain(self.cfg, model, self.domain)
        if self.classes:
            self.predictions = self._classes(model)
        else:
            self.predictions = predict_boxes(model, self.loader, self.device)
        if rank() == 0 and folder is not None:
            name = "classification_results.json" if self.classes else "coco_instances_results.json"
            write_json(folder / name, self.predictions)
        return gather_objects(self._score() if rank() == 0 else {})[0]

    def _score(self) -> Scores:
        if self.classes:
            return {"classification": accuracy(self.predictions, self.loader.dataset.class_names)}
        return _score(self.cfg, self.predictions, self.loader.dataset.ground_truth())

    def _classes(self, model: nn.Module) -> list[dict[str, Any]]:
        """Predictions of a classifier: under minibatch statistics, of minibatches."""
        if not any(m.uses_minibatch for m in model.modules() if isinstance(m, DomainBatchNorm)):
            return predict_classes(model, self.loader, self.device)
        loader = minibatch_loader(self.cfg, self.loader, rank=rank(), world_size=world_size())
        with whole_minibatches(model):
            return predict_classes(model, loader, self.device)


def overall_scores(tests: Sequence[TestSet]) -> Scores:
    """The metrics of the last predictions of all `tests`, as if they were one set; the same on every rank."""
    found: Scores = {}
    if rank() == 0 and tests[0].classes:
        everything = [prediction for test in tests for prediction in test.predictions]
        found = {"classification": accuracy(everything, tests[0].loader.dataset.class_names)}
    elif rank() == 0:
        predictions: list[dict[str, Any]] = []
        truth: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
        for test in tests:
            _append(truth, predictions, test)
        found = _score(tests[0].cfg, predictions, truth)
    return gather_objects(found)[0]


def _append(truth: dict[str, Any], predictions: list[dict[str, Any]], test: TestSet) -> None:
    """With image ids that no other set has, and the model's labels, from 1, for category ids."""
    dataset = test.loader.dataset
    labels = {id_: label for label, id_ in enumerate(dataset.category_ids, start=1) if id_ is not None}
    truth["categories"] = [{"id": k, "name": name} for k, name in enumerate(dataset.class_names, start=1)]
    own = dataset.ground_truth()
    first = len(truth["images"])
    ids = {image["id"]: first + k for k, image in enumerate(own["images"])}
    truth["images"] += [image | {"id": ids[image["id"]]} for image in own["images"]]
    for source, target in ((own["annotations"], truth["annotations"]), (test.predictions, predictions)):
        number = len(target)
        target += [
            entry | {"id": number + k, "image_id": ids[entry["image_id"]], "category_id": labels[entry["category_id"]]}
            for k, entry in enumerate(source)
            if entry["category_id"] in labels
        ]


def _score(cfg: CfgNode, predictions: list[dict[str, Any]], truth: dict[str, Any]) -> Scores:
    count = cfg.TEST.DETECTIONS_PER_IMAGE
    if count > MAX_DETECTIONS:
        logger.info("AP counts the %d best detections of an image (COCO's 100 are fewer than a model gives)", count)
    return {
        kind: evaluate_coco(predictions, truth, kind, max_detections=count)
        for kind in ("bbox", "segm")[: 1 + cfg.MODEL.MASK_ON]
    }
