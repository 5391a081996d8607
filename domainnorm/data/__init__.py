from .classification import ClassificationDataset
from .coco import CocoDataset, resolve_dataset
from .image import read_image
from .loader import EvaluationLoader, domain_names, num_classes, test_loader, train_loader

__all__ = [
    "ClassificationDataset",
    "CocoDataset",
    "EvaluationLoader",
    "domain_names",
    "num_classes",
    "read_image",
    "resolve_dataset",
    "test_loader",
    "train_loader",
]
