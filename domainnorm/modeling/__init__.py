from .build import build_model
from .classifier import Classifier
from .mask_rcnn import GeneralizedRCNN
from .retinanet import RetinaNet, RetinaNetHead

__all__ = ["Classifier", "GeneralizedRCNN", "RetinaNet", "RetinaNetHead", "build_model"]
