"""Images, data sets, and the batches that are made of them."""

from ..option import CLASSES_OR_0, INTENSITY, PIXELS, PIXELS_OR_0, SHARE, Option, Range, Section
from .model import CLASSIFIER, DETECTORS


class Input(Section, key="INPUT"):
    """Size and augmentation of images; sizes are in pixels."""

    MIN_SIZE_TRAIN = Option(
        [800], "Shorter side; of several, one is drawn for each image.", PIXELS, min_length=1, used_by=DETECTORS
    )
    MAX_SIZE_TRAIN = Option(1333, "Upper limit of the longer side in training.", PIXELS, used_by=DETECTORS)
    MIN_SIZE_TEST = Option(800, "Shorter side in inference.", PIXELS, used_by=DETECTORS)
    MAX_SIZE_TEST = Option(1333, "Upper limit of the longer side in inference.", PIXELS, used_by=DETECTORS)
    RANDOM_FLIP = Option(0.5, "Probability of a horizontal flip in training.", SHARE)
    RANDOM_VERTICAL_FLIP = Option(0.0, "Probability of a vertical flip in training.", SHARE)
    PHOTOMETRIC_DISTORT = Option(
        0.0,
        "Probability, in training, of changing each of brightness, contrast, saturation, hue and channel order.",
        SHARE,
    )
    RANDOM_IOU_CROP = Option(
        0.0,
        "Probability, in training, of SSD's crop: 0.3 to 1 of each side, with enough overlap with an object.",
        SHARE,
        used_by=DETECTORS,
    )
    SCALE_JITTER = Option(
        [],
        "Range of a random factor, such as 0.1, 2.0, instead of MIN_SIZE_TRAIN: the longer side becomes MAX_SIZE_TRAIN "
        "times the factor, and what exceeds MAX_SIZE_TRAIN is cropped; []: none.",
        Range(min=0.01, max=10),
        element=float,
        used_by=DETECTORS,
    )
    MAX_INTENSITY = Option(
        0.0,
        "Intensity of white in images of more than 8 bits; 0: 65535 or, for floats, 1, 255 or 65535, by a sample of "
        "the set.",
        INTENSITY,
    )
    CUTOUT = Option(
        0, "Side of the square that is cut out in training, in pixels; 0: none.", PIXELS_OR_0, used_by=CLASSIFIER
    )
    CROP_SIZE = Option(224, "Side of the square images.", PIXELS, used_by=CLASSIFIER)
    CROP = Option(
        "random_resized",
        "Crop in training: random_resized, as for ImageNet; padded by CROP_SIZE // 8, as for CIFAR; or none.",
        ("random_resized", "padded", "none"),
        used_by=CLASSIFIER,
    )


class Datasets(Section, key="DATASETS"):
    """The data sets, their domains and their categories.

    A data set is a name (shapes_train, coco_2017_train, …) or "annotations.json:image_folder"; for a Classifier
    patches_train, a folder with one subfolder for each class, "file.npz", or "images-idx3-ubyte:labels-idx1-ubyte".
    A prefix "NAME=" sets the name in tables, tags and results.
    """

    TRAIN = Option([], "Training sets: names, or pairs of paths such as NAME=annotations.json:image_folder.")
    VALIDATION = Option(
        0.0,
        "Share of each class of TRAIN to hold out, as the data set NAME@validation for each NAME.",
        Range(min=0, max=0.99),
        used_by=CLASSIFIER,
    )
    TEST = Option([], "Data sets to evaluate on, one by one.")
    DOMAINS = Option([], "Domain name of each data set in TRAIN; several may share one; []: no domains.")
    TEST_DOMAINS = Option([], "Domain name of each data set in TEST, '' if unknown; []: that of the same set in TRAIN.")
    LABELS = Option(
        "equal", "Categories: the same in all data sets (equal), or all names in TRAIN (union).", ("equal", "union")
    )
    RENAME = Option([], "New names of categories, such as rbc=RBC; categories with the same name are merged.")


class DataLoader(Section, key="DATALOADER"):
    """Data loading and batches. A normalization batch is one rank's images in one of a step's ACCUMULATE passes."""

    NUM_WORKERS = Option(
        2,
        "Number of loading processes per rank; 0: the main process loads; -1: as many as the rank has cores, up to 16.",
        Range(min=-1, limit=256),
    )
    ASPECT_RATIO_GROUPING = Option(True, "Fill each batch with only wide or only tall images.", used_by=DETECTORS)
    FILTER_EMPTY_ANNOTATIONS = Option(True, "Leave out training images without objects.", used_by=DETECTORS)
    RATIOS = Option(
        [],
        "Relative frequency of images from each data set in TRAIN; []: proportional to their numbers.",
        Range(above=0, limit=1e6),
        element=float,
    )
    COMPOSITION = Option(
        "mixed",
        "Domains in a normalization batch: any; one per rank, exchanged between ranks; or one for the whole SGD step.",
        ("mixed", "one_domain_per_rank", "one_domain_per_batch"),
    )
    INVALID_BOXES = Option(
        "error", "What to do with boxes outside the image or without area.", ("error", "skip"), used_by=DETECTORS
    )
    BATCHES = Option(
        "iid",
        "Classes in a normalization batch: any; a random few; a few, each once per round; or no class in both halves.",
        ("iid", "few_classes", "few_classes_in_rounds", "class_disjoint_halves"),
        used_by=CLASSIFIER,
    )
    CLASSES_PER_BATCH = Option(
        0, "Number of classes, if BATCHES is few_classes or few_classes_in_rounds.", CLASSES_OR_0, used_by=CLASSIFIER
    )
    CLASSES_WITH_REPLACEMENT = Option(
        True,
        "Draw these classes independently (Batch Renormalization, 4.3), so that one may occur twice.",
        used_by=CLASSIFIER,
    )
