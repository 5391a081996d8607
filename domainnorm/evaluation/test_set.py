"""A data set of the config to evaluate on, and what a model scores there."""

from pathlib import Path

from fvcore.common.config import CfgNode
from torch import nn

from ..data import test_loader
from ..distributed import gather_objects, get_device, rank, world_size
from ..output import write_json
from .classification import accuracy, predict_classes
from .coco import evaluate_coco, predict

Scores = dict[str, dict[str, float]]  # of each kind ("bbox", "segm" or "classification") its metrics


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
        self.truth = {} if self.classes or rank() else self.loader.dataset.ground_truth()

    def scores(self, model: nn.Module, folder: Path | None = None) -> Scores:
        """Of `model` in the mode it is in, the same on every rank; the predictions go to `folder`."""
        if self.classes:
            predictions = predict_classes(model, self.loader, self.device)
        else:
            predictions = predict(model, self.loader, self.device)
        found: Scores = {}
        if rank() == 0:
            if folder is not None:
                name = "classification_results.json" if self.classes else "coco_instances_results.json"
                write_json(folder / name, predictions)
            if self.classes:
                found = {"classification": accuracy(predictions)}
            else:
                kinds = ("bbox", "segm") if self.cfg.MODEL.MASK_ON else ("bbox",)
                found = {kind: evaluate_coco(predictions, self.truth, kind) for kind in kinds}
        return gather_objects(found)[0]
