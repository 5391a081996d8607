"""Images, data sets, and the batches that are made of them."""

from ..option import CLASSES_OR_0, INTENSITY, PIXELS, PIXELS_OR_0, SHARE, Option, Range, Section
from .model import CLASSIFIER, DETECTORS


class Input(Section, key="INPUT"):
    """Size and augmentation of images; sizes are in pixels."""

    MIN_SIZE_TRAIN = Option(
        [800], "Shorter side; one is drawn for each image.", PIXELS, min_length=1, used_by=DETECTORS
    )
    MAX_SIZE_TRAIN = Option(1333, "Largest longer side in training.", PIXELS, used_by=DETECTORS)
    MIN_SIZE_TEST = Option(800, "Shorter side in inference.", PIXELS, used_by=DETECTORS)
    MAX_SIZE_TEST = Option(1333, "Largest longer side in inference.", PIXELS, used_by=DETECTORS)
    RANDOM_FLIP = Option(0.5, "Probability of a horizontal flip in training.", SHARE)
    RANDOM_VERTICAL_FLIP = Option(0.0, "Probability of a vertical flip in training.", SHARE)
    PHOTOMETRIC_DISTORT = Option(
        0.0,
        "Probability, in training, of a change of each of brightness, contrast, saturation, hue and order of channels.",
        SHARE,
    )
    RANDOM_IOU_CROP = Option(
        0.0,
        "Probability, in training, of SSD's crop: of 0.3 to 1 of the sides, with enough of an object.",
        SHARE,
        used_by=DETECTORS,
    )
    SCALE_JITTER = Option(
        [],
        "Range of a factor, as 0.1, 2.0, instead of MIN_SIZE_TRAIN: the longer side becomes MAX_SIZE_TRAIN times one "
        "that is drawn, and what exceeds MAX_SIZE_TRAIN is cropped; []: none.",
        Range(min=0.01, max=10),
        element=float,
        used_by=DETECTORS,
    )
    MAX_INTENSITY = Option(
        0.0,
        "Intensity of white in images of more than 8 bits; 0: 65535, of floats 1, 255 or 65535 by a sample of the set.",
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
    "NAME=" before it is what tables, tags and results call it.
    """

    TRAIN = Option([], "Training sets: names, or pairs of paths such as NAME=annotations.json:image_folder.")
    VALIDATION = Option(
        0.0,
        "Share of each class of TRAIN that is held out: the data set NAME@validation for each NAME.",
        Range(min=0, max=0.99),
        used_by=CLASSIFIER,
    )
    TEST = Option([], "Data sets to evaluate on, one by one.")
    DOMAINS = Option([], "Name of the domain of each of TRAIN; several may have the same; []: no domains.")
    TEST_DOMAINS = Option([], "Name of the domain of each of TEST, '' for unknown; []: that of the same set in TRAIN.")
    LABELS = Option("equal", "Categories: equal in all data sets, or all names in TRAIN.", ("equal", "union"))
    RENAME = Option([], "New names of categories, such as rbc=RBC; those of one name become one.")


class DataLoader(Section, key="DATALOADER"):
    """Loading, and what a batch is made of. A normalization batch is the share of one rank and one of ACCUMULATE."""

    NUM_WORKERS = Option(
        2,
        "Number of loading processes for each rank; 0: the main process loads; -1: as many as there are cores for it, "
        "up to 16.",
        Range(min=-1, limit=256),
    )
    ASPECT_RATIO_GROUPING = Option(True, "Fill a batch with either wide or tall images.", used_by=DETECTORS)
    FILTER_EMPTY_ANNOTATIONS = Option(True, "Train without the images that have no object.", used_by=DETECTORS)
    RATIOS = Option(
        [],
        "How often images of each of TRAIN are drawn; []: by their numbers.",
        Range(above=0, limit=1e6),
        element=float,
    )
    COMPOSITION = Option(
        "mixed",
        "Domains in a normalization batch: any; one, exchanged between the ranks; or one in the whole SGD step.",
        ("mixed", "one_domain_per_rank", "one_domain_per_batch"),
    )
    INVALID_BOXES = Option("error", "Boxes outside the image or of no area.", ("error", "skip"), used_by=DETECTORS)
    BATCHES = Option(
        "iid",
        "Classes in a normalization batch: any; random ones; random ones, each once in a round; none in both halves.",
        ("iid", "few_classes", "few_classes_in_rounds", "class_disjoint_halves"),
        used_by=CLASSIFIER,
    )
    CLASSES_PER_BATCH = Option(0, "Number of classes, if BATCHES has random ones.", CLASSES_OR_0, used_by=CLASSIFIER)
    CLASSES_WITH_REPLACEMENT = Option(
        True, "Draw them independently (Batch Renormalization, 4.3), so that one may come twice.", used_by=CLASSIFIER
    )
