"""The model: META_ARCHITECTURE, backbone, pyramid and heads."""

from ..option import (
    BINS,
    CHANNELS,
    CLASSES_OR_0,
    LAYERS,
    LAYERS_OR_0,
    OBJECTS,
    PIXELS,
    SHARE,
    Option,
    Range,
    Section,
)
from .norm import NORMS, SHARED

RETINANET, RCNN, CLASSIFIER = ("RetinaNet",), ("GeneralizedRCNN",), ("Classifier",)
DETECTORS = RETINANET + RCNN
NUM_CLASSES = {  # where each architecture has its number of classes
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "Classifier": "MODEL.CLASSIFIER.NUM_CLASSES",
}
SMOOTH_L1 = "Where the smooth L1 loss of boxes becomes linear, in units of encoded boxes; 0: L1, as in detectron2."
ROI_ALIGN = "RoIAlign variant: ROIAlignV2 is aligned by half a pixel, as is detectron2's default."
BETA = Range(min=0, limit=100)
LEVELS = Range(above=0, max=7)  # of stride 512, or 256
SAMPLING_RATIO = "Number of points along each side of a bin; 0: as many as it has pixels, as in detectron2."
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v3_large", "mobilenet_v3_small")


class Model(Section, key="MODEL"):
    """The model as a whole."""

    META_ARCHITECTURE = Option("RetinaNet", "Model; GeneralizedRCNN is Faster or Mask R-CNN.", DETECTORS + CLASSIFIER)
    DEVICE = Option("auto", "Device; auto: cuda if there is a GPU, otherwise cpu.", ("auto", "cuda", "cpu"))
    WEIGHTS = Option(
        "", "Initial weights: a file, or torchvision's, such as ResNet50_Weights.IMAGENET1K_V2; '': random."
    )
    WEIGHTS_STRICT = Option(
        True, "Refuse weights that differ in more than classes and masks; False: initialize anew what does not fit."
    )
    CLASS_NAMES = Option(
        [], "Name of each class; []: those of the training sets, which a run writes here. Labels are matched by name."
    )
    MASK_ON = Option(False, "Also predict masks: Mask R-CNN instead of Faster R-CNN.", used_by=RCNN)
    PIXEL_MEAN = Option([0.485, 0.456, 0.406], "Mean of R, G and B, in [0, 1].", SHARE, length=3)
    PIXEL_STD = Option(
        [0.229, 0.224, 0.225], "Standard deviation of R, G and B, in [0, 1].", Range(above=0, max=1), length=3
    )
    NORM_DOMAINS = Option("", "'dataset': all norms except GN have the domains of DATASETS.DOMAINS.", ("", "dataset"))


class Backbone(Section, key="MODEL.BACKBONE"):
    """The backbone of a detector, or the network of a classifier."""

    NAME = Option(
        "resnet50",
        "A model of torchvision (such as resnet50 or mobilenet_v3_large) or timm/NAME; for a Classifier also "
        "cifar_resnet18, cifar_resnet20 (any 6n + 2), cifar_wide_resnet28_10 or simplenet_512_300.",
    )
    NORM = Option("FrozenBN", "Norm layer, with the options of MODEL.NORM; '': none.", NORMS)
    FREEZE_AT = Option(2, "Number of frozen stages, stem first; 0: none.", Range(min=0, max=5), used_by=DETECTORS)
    STRIDE_IN_1X1 = Option(
        False, "Put a bottleneck's stride in its first 1x1 convolution, as in MSRA's weights.", used_by=DETECTORS
    )


class FPN(Section, key="MODEL.FPN", used_by=DETECTORS):
    """The feature pyramid network."""

    NUM_LEVELS = Option(
        5, "Number of levels, from stride 8 (P3) on in a RetinaNet, from stride 4 (P2) on in a GeneralizedRCNN.", LEVELS
    )
    P6_FROM = Option(
        "c5", "Input of P6: C5, or P5 as in torchvision's first RetinaNet.", ("c5", "p5"), used_by=RETINANET
    )
    OUT_CHANNELS = Option(256, "Number of channels of every pyramid level, and of the dense head.", CHANNELS)
    NORM = Option("", "Norm layer after each convolution, as MODEL.BACKBONE.NORM.", NORMS)


class AnchorGenerator(Section, key="MODEL.ANCHOR_GENERATOR", used_by=DETECTORS):
    """The anchor boxes."""

    SIZES = Option(
        [32, 64, 128, 256, 512],
        "One size per level, in pixels; a RetinaNet has 3 scales of each.",
        PIXELS,
        min_length=1,
    )
    ASPECT_RATIOS = Option([0.5, 1.0, 2.0], "Height / width, at every size.", Range(min=0.01, max=100), min_length=1)
    ROUNDED = Option(True, "Round sides to whole pixels, as torchvision; False: keep them exact, as detectron2.")


class RetinaNet(Section, key="MODEL.RETINANET", used_by=RETINANET):
    """The head of a RetinaNet, its losses and its detections.

    The defaults of SGD_STATISTICS, POPULATION_STATISTICS and AFFINE are row 4 of Table 5 of Rethinking "Batch" in
    BatchNorm, whose domains are the pyramid levels.
    """

    NUM_CLASSES = Option(0, "Number of classes; 0: as many as the training sets have.", CLASSES_OR_0)
    NUM_CONVS = Option(4, "Number of convolutions in each of the two towers.", LAYERS_OR_0)
    NORM = Option("", "Norm layer of the towers, as MODEL.BACKBONE.NORM.", NORMS)
    NORM_DOMAINS = Option("level", "What the domains of the head are.", ("level", "dataset", "level_and_dataset"))
    SGD_STATISTICS = Option("per_domain", "Statistics that normalize in training.", SHARED)
    POPULATION_STATISTICS = Option("per_domain", "Statistics that normalize in inference.", SHARED)
    AFFINE = Option("shared", "Weight and bias; '': none.", (*SHARED, ""))
    PRIOR_PROB = Option(0.01, "Probability of foreground predicted at the first step.", Range(above=0, max=0.99))
    IOU_THRESHOLDS = Option(
        [0.4, 0.5], "IoU of anchors: background below the first, foreground from the second.", SHARE, length=2
    )
    FOCAL_LOSS_ALPHA = Option(0.25, "Weight of foreground in the focal loss; that of background is 1 - alpha.", SHARE)
    FOCAL_LOSS_GAMMA = Option(
        2.0, "Exponent of the focal loss: how strongly it down-weights well-classified anchors.", Range(min=0, limit=20)
    )
    BBOX_REG_LOSS_TYPE = Option("smooth_l1", "Loss of the boxes.", ("smooth_l1", "giou"))
    SMOOTH_L1_LOSS_BETA = Option(0.1, "Where smooth L1 becomes linear, in units of encoded boxes.", BETA)
    SCORE_THRESH_TEST = Option(0.05, "Detections with a lower score are dropped.", SHARE)
    NMS_THRESH_TEST = Option(0.5, "IoU for NMS within a class.", SHARE)
    TOPK_CANDIDATES_TEST = Option(1000, "Largest number of candidates per level before NMS.", OBJECTS)


class RPN(Section, key="MODEL.RPN", used_by=RCNN):
    """The region proposal network."""

    NUM_CONV = Option(1, "Number of 3x3 convolutions before the predictions.", LAYERS)
    IOU_THRESHOLDS = Option(
        [0.3, 0.7], "IoU of anchors: background below the first, foreground from the second.", SHARE, length=2
    )
    BATCH_SIZE_PER_IMAGE = Option(256, "Number of anchors per image sampled for the loss.", OBJECTS)
    POSITIVE_FRACTION = Option(0.5, "Largest share of foreground among the sampled anchors.", SHARE)
    PRE_NMS_TOPK_TRAIN = Option(2000, "Largest number of proposals per level before NMS, in training.", OBJECTS)
    PRE_NMS_TOPK_TEST = Option(1000, "Largest number of proposals per level before NMS, in inference.", OBJECTS)
    POST_NMS_TOPK_TRAIN = Option(1000, "Largest number of proposals per image after NMS, in training.", OBJECTS)
    POST_NMS_TOPK_TEST = Option(1000, "Largest number of proposals per image after NMS, in inference.", OBJECTS)
    NMS_THRESH = Option(0.7, "IoU for NMS within a level.", SHARE)
    SMOOTH_L1_BETA = Option(1 / 9, SMOOTH_L1, BETA)


class RoIHeads(Section, key="MODEL.ROI_HEADS", used_by=RCNN):
    """Options that the box head and the mask head share."""

    NUM_CLASSES = Option(0, "Number of classes; 0: as many as the training sets have.", CLASSES_OR_0)
    BATCH_SIZE_PER_IMAGE = Option(512, "Number of RoIs per image sampled for training.", OBJECTS)
    POSITIVE_FRACTION = Option(0.25, "Largest share of foreground among the sampled RoIs.", SHARE)
    IOU_THRESHOLDS = Option([0.5], "IoU from which a RoI is foreground.", SHARE, length=1)
    SHUFFLE = Option(False, 'Train on RoIs randomly permuted over the processes (Rethinking "Batch", 6.1).')
    SCORE_THRESH_TEST = Option(0.05, "Detections with a lower score are dropped.", SHARE)
    NMS_THRESH_TEST = Option(0.5, "IoU for NMS within a class.", SHARE)


class RoIBoxHead(Section, key="MODEL.ROI_BOX_HEAD", used_by=RCNN):
    """The box head; NUM_CONV 4 and NUM_FC 1 are the 4conv1fc head of Rethinking "Batch" in BatchNorm."""

    NUM_CONV = Option(0, "Number of 3x3 convolutions.", LAYERS_OR_0)
    CONV_DIM = Option(256, "Number of channels of the convolutions.", CHANNELS)
    NUM_FC = Option(2, "Number of linear layers after the convolutions.", LAYERS)
    FC_DIM = Option(1024, "Number of features of the linear layers.", CHANNELS)
    NORM = Option("", "Norm layer after each convolution, as MODEL.BACKBONE.NORM.", NORMS)
    POOLER_RESOLUTION = Option(7, "Height and width of the features of a RoI.", BINS)
    POOLER_TYPE = Option("ROIAlign", ROI_ALIGN, ("ROIAlign", "ROIAlignV2"))
    POOLER_SAMPLING_RATIO = Option(2, SAMPLING_RATIO, Range(min=0, limit=16))
    SMOOTH_L1_BETA = Option(1 / 9, SMOOTH_L1, BETA)


class RoIMaskHead(Section, key="MODEL.ROI_MASK_HEAD", used_by=RCNN):
    """The mask head, with MODEL.MASK_ON."""

    NUM_CONV = Option(4, "Number of 3x3 convolutions.", LAYERS)
    CONV_DIM = Option(256, "Number of channels of the convolutions.", CHANNELS)
    NORM = Option("", "Norm layer after each convolution, as MODEL.BACKBONE.NORM.", NORMS)
    POOLER_RESOLUTION = Option(14, "Height and width of the features of a RoI; a mask has twice that.", BINS)
    POOLER_TYPE = Option("ROIAlign", ROI_ALIGN, ("ROIAlign", "ROIAlignV2"))
    POOLER_SAMPLING_RATIO = Option(2, SAMPLING_RATIO, Range(min=0, limit=16))


class Classifier(Section, key="MODEL.CLASSIFIER", used_by=CLASSIFIER):
    """The classifier."""

    NUM_CLASSES = Option(0, "Number of classes; 0: as many as the training sets have.", CLASSES_OR_0)
    LABEL_SMOOTHING = Option(
        0.0, "Share of the target that is spread evenly over all classes, in training.", Range(min=0, max=0.99)
    )
