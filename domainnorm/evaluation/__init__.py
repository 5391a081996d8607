from .coco import evaluate_coco, predict
from .compare import evaluate

__all__ = ["evaluate", "evaluate_coco", "predict"]
