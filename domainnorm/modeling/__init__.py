from .build import NUM_LEVELS, build_model
from .classifier import Classifier
from .mask_rcnn import GeneralizedRCNN
from .retinanet import RetinaNet, RetinaNetHead

__all__ = ["NUM_LEVELS", "Classifier", "GeneralizedRCNN", "RetinaNet", "RetinaNetHead", "build_model"]
