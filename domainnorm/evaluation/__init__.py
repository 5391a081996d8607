from .coco import evaluate_coco, predict
from .compare import evaluate
from .recompute import recompute

__all__ = ["evaluate", "evaluate_coco", "predict", "recompute"]
