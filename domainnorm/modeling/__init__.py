from .build import build_model
from .mask_rcnn import GeneralizedRCNN
from .retinanet import RetinaNet, RetinaNetHead

__all__ = ["GeneralizedRCNN", "RetinaNet", "RetinaNetHead", "build_model"]
