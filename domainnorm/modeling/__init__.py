from .build import build_model
from .retinanet import RetinaNet, RetinaNetHead

__all__ = ["RetinaNet", "RetinaNetHead", "build_model"]
