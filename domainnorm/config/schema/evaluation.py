"""Evaluation: which statistics normalize, and from which images they come."""

from ..option import IMAGES, IMAGES_OR_0, ITERATIONS, ITERATIONS_OR_0, OBJECTS, SHARE, Option, Section
from .model import CLASSIFIER, DETECTORS

STATISTICS = ("population", "minibatch", "recomputed")


class Test(Section, key="TEST"):
    """Evaluation."""

    STATISTICS = Option(["population"], "Statistics to evaluate with, side by side.", STATISTICS, min_length=1)
    EXAMPLE_WEIGHTS = Option(
        [], "Weights of inference example weighing (Four Things, 3.1); []: none.", SHARE, element=float
    )
    EXAMPLE_WEIGHT_DATASET = Option(
        "", "Data set, not in TEST, on which the best of several EXAMPLE_WEIGHTS is chosen."
    )
    EXAMPLE_WEIGHT_METRIC = Option(
        "",
        "Metric for choosing among EXAMPLE_WEIGHTS: top1, top5 or loss of a classifier; AP, AP50, …; '': top1 or AP.",
    )
    DOMAIN = Option(
        "given",
        "Domain of an image: given by DATASETS.TEST_DOMAINS; nearest, by its statistics; average: all domains merged.",
        ("given", "nearest", "average"),
    )
    MINIBATCH_SIZE = Option(
        0,
        "Number of images normalized together under minibatch statistics; 0: as in training; 1: InstanceNorm.",
        IMAGES_OR_0,
        used_by=CLASSIFIER,
    )
    BATCHES = Option(
        "iid",
        "Classes in a minibatch: any (iid), or as in DATALOADER.BATCHES (training).",
        ("iid", "training"),
        used_by=CLASSIFIER,
    )
    TRAINING_IMAGES = Option(
        0,
        "Number of training images on which the model is also scored in training mode; 0: none.",
        ITERATIONS_OR_0,
        used_by=CLASSIFIER,
    )
    EVAL_PERIOD = Option(0, "Number of iterations between evaluations; 0: only after training.", ITERATIONS_OR_0)
    AUDIT_PERIOD = Option(
        0,
        "Number of iterations between audits of the norms on the images of a step, which are logged; 0: none.",
        ITERATIONS_OR_0,
    )
    IMS_PER_BATCH = Option(1, "Number of images that each rank loads together; results do not depend on it.", IMAGES)
    DETECTIONS_PER_IMAGE = Option(
        100,
        "Largest number of detections, over all classes; AP counts up to this many per class, or 100 if that is more.",
        OBJECTS,
        used_by=DETECTORS,
    )
    PICTURES = Option(
        4, "Number of images whose predictions TensorBoard shows at each evaluation; 0: none.", IMAGES_OR_0
    )
    REPORT = Option(True, "Write report.html after training and after --eval-only; needs matplotlib.")


class Recompute(Section, key="TEST.RECOMPUTE"):
    """Population statistics recomputed with the current weights (Rethinking "Batch", 3.2 and 5.1)."""

    NUM_SAMPLES = Option(1000, "Number of images, over all processes.", ITERATIONS)
    BATCH_SIZE = Option(
        0,
        "Number of images in a batch, over all processes (B; the paper: 100 or more); 0: as in training.",
        IMAGES_OR_0,
    )
    KEEP_GROUPS = Option(False, "Norms that split the batch in training also split it here.")
    METHOD = Option("pooled", "How the statistics of batches are merged.", ("pooled", "mean_of_variances", "exact"))
    DATASET = Option("", "Data set to recompute on, such as one of another domain; '': DATASETS.TRAIN.")
    IN_CHECKPOINT = Option(False, "Also replace the model's own statistics by them at the end of training.")
