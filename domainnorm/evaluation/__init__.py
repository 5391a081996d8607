from .coco import evaluate_coco, predict
from .compare import evaluate
from .recompute import recompute
from .report import write_report

__all__ = ["evaluate", "evaluate_coco", "predict", "recompute", "write_report"]
