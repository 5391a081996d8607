"""Options of the norm layers, wherever one of them is chosen."""

from ..option import CHANNELS, IMAGES, IMAGES_OR_0, ITERATIONS_OR_0, SHARE, Option, Range, Section

BATCH_NORMS = ("BN", "SyncBN", "GhostBN", "SeqNorm", "BGN", "GBGN", "BRN")
SAMPLE_NORMS = ("GN", "IN", "PN")  # of one sample alone
NORMS = ("", *SAMPLE_NORMS, "FrozenBN", *BATCH_NORMS)
SHARED = ("shared", "per_domain")


class Norm(Section, key="MODEL.NORM"):
    """Options of all norms."""

    EPS = Option(0.0, "Added to the variance; 0: the layer's own, 1e-5 (1e-3 in MobileNets).", Range(min=0, max=1))
    MOMENTUM = Option(0.0, "EMA momentum, as in torch; 0: the layer's own, 0.1 (0.01 in MobileNets and BRN).", SHARE)
    FIXED_WEIGHT = Option(False, "Weights (gamma) stay 1, and only biases are trained (Batch Renormalization, 4).")
    SYNC_GROUP_SIZE = Option(
        0, "Number of consecutive processes that a synchronized norm merges; 0: all.", Range(min=0, limit=10**5)
    )


class GN(Section, key="MODEL.NORM.GN"):
    """GroupNorm. A layer uses the greatest common divisor of NUM_GROUPS and its channels."""

    NUM_GROUPS = Option(32, "Number of channel groups.", CHANNELS)


class GhostBN(Section, key="MODEL.NORM.GHOSTBN"):
    """BatchNorm over groups of samples of one process."""

    SAMPLES_PER_GROUP = Option(16, "Number of images, or RoIs, in a group.", IMAGES, renamed_from="GROUP_SIZE")
    NUM_SAMPLE_GROUPS = Option(0, "Number of groups, which replaces SAMPLES_PER_GROUP; 0: use that.", IMAGES_OR_0)


class SeqNorm(Section, key="MODEL.NORM.SEQNORM"):
    """GroupNorm, then GhostBN. A layer uses the greatest common divisor of NUM_CHANNEL_GROUPS and its channels."""

    NUM_CHANNEL_GROUPS = Option(4, "Number of groups of the GroupNorm.", CHANNELS, renamed_from="CHANNEL_GROUPS")
    NUM_SAMPLE_GROUPS = Option(8, "Number of groups of the GhostBN.", IMAGES, renamed_from="BATCH_GROUPS")
    GROUP_NORM_FIRST = Option(True, "False: the GhostBN comes first, then the GroupNorm.")


class BGN(Section, key="MODEL.NORM.BGN"):
    """Batch Group Normalization: features C x H x W are flattened and split into G pieces, each with all samples.

    If G does not divide a layer's channels, its pieces split them in space, and the layer works at one feature size.
    """

    NUM_GROUPS = Option(16, "Number of pieces (G).", CHANNELS)
    SPLIT_SPACE = Option(True, "Split channels in space where G does not divide them; False: use a divisor of both.")
    SYNC = Option(False, "Use the statistics of all processes.")


class GBGN(Section, key="MODEL.NORM.GBGN"):
    """Groups of samples and channels normalized together (Four Things, 3.4).

    A layer uses the greatest common divisor of NUM_CHANNEL_GROUPS and its channels.
    """

    NUM_CHANNEL_GROUPS = Option(32, "Number of channel groups.", CHANNELS, renamed_from="CHANNEL_GROUPS")
    SAMPLES_PER_GROUP = Option(2, "Number of images, or RoIs, in a group.", IMAGES, renamed_from="EXAMPLES_PER_GROUP")


class BRN(Section, key="MODEL.NORM.BRN"):
    """Batch Renormalization: BatchNorm corrected towards the running statistics.

    It is BatchNorm until BN_UNTIL; then the limits grow linearly. The three times are iterations or, below 1, shares of
    SOLVER.MAX_ITER; the defaults are the paper's 5k, 40k and 25k of 130k steps.
    """

    R_MAX = Option(3.0, "Limit of the correction of the standard deviation.", Range(min=1, limit=1e6))
    D_MAX = Option(5.0, "Limit of the correction of the mean, in standard deviations.", Range(min=0, limit=1e6))
    BN_UNTIL = Option(
        0.04, "When the limits begin to grow; if R_MAX_AT and D_MAX_AT are 0 too, they are constant.", ITERATIONS_OR_0
    )
    R_MAX_AT = Option(0.3, "When R_MAX is reached.", ITERATIONS_OR_0)
    D_MAX_AT = Option(0.2, "When D_MAX is reached.", ITERATIONS_OR_0)
    MOMENTUM = Option(0.01, "EMA momentum of the running statistics, as in torch.", SHARE)
    SAMPLES_PER_GROUP = Option(0, "Number of samples in a micro-batch; 0: all.", IMAGES_OR_0, renamed_from="GROUP_SIZE")
    SYNC = Option(False, "Use the statistics of all processes; needs SAMPLES_PER_GROUP 0.")


class DatasetNorm(Section, key="MODEL.DATASET_NORM"):
    """What data sets share in a norm, with MODEL.NORM_DOMAINS; the head of a RetinaNet has its own options."""

    SGD_STATISTICS = Option("per_domain", "Statistics that normalize in training.", SHARED)
    POPULATION_STATISTICS = Option("per_domain", "Statistics that normalize in inference.", SHARED)
    AFFINE = Option("shared", "Weight and bias; '': none.", (*SHARED, ""))
