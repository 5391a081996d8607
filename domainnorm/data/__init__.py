from .catalog import by_name, split_name
from .classes import num_classes
from .classification import ClassificationDataset
from .coco import CocoDataset, resolve_dataset
from .domains import domain_names
from .image import read_image
from .loader import EvaluationLoader, minibatch_loader, one_set_loader, test_loader, train_loader, training_sets
from .own import own_sets

__all__ = [
    "ClassificationDataset",
    "CocoDataset",
    "EvaluationLoader",
    "by_name",
    "domain_names",
    "minibatch_loader",
    "num_classes",
    "one_set_loader",
    "own_sets",
    "read_image",
    "resolve_dataset",
    "split_name",
    "test_loader",
    "train_loader",
    "training_sets",
]
