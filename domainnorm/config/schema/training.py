"""A run, and its optimizer, schedule and precision."""

from ..option import BELOW_ONE, IMAGES, IMAGES_OR_0, ITERATIONS, ITERATIONS_OR_0, SHARE, Option, Range, Section


class Run(Section, key=""):
    """The run as a whole. On a CPU, runs are bitwise reproducible on the same machine."""

    OUTPUT_DIR = Option("./output", "Folder of checkpoints, logs and results.")
    SEED = Option(0, "Seed of weights, sampling and augmentation.", Range(min=0, limit=2**32 - 1))


class Solver(Section, key="SOLVER"):
    """Optimization: images and steps, learning rate, decay, frozen norms, averaged weights.

    FREEZE_NORM_AT and AVERAGE_WEIGHTS_FROM are iterations or, below 1, shares of MAX_ITER.
    """

    IMS_PER_BATCH = Option(16, "Number of images in one SGD step, over all processes.", IMAGES)
    ACCUMULATE = Option(
        1, "Number of backward passes in one SGD step, each with its own normalization batches.", IMAGES
    )
    VIRTUAL_BATCH = Option(
        0,
        "Number of extra images in each process's forward pass that only count in the statistics of norms.",
        IMAGES_OR_0,
    )
    OPTIMIZER = Option("SGD", "Optimizer, of torch.optim.", ("SGD", "AdamW", "Adam", "RMSprop"))
    BASE_LR = Option(0.01, "Learning rate after the warm-up.", Range(above=0))
    MOMENTUM = Option(0.9, "Momentum of SGD and RMSprop.", BELOW_ONE)
    ADAM_BETAS = Option([0.9, 0.999], "Decay of the averages of Adam and AdamW.", BELOW_ONE, length=2)
    RMSPROP_ALPHA = Option(0.99, "Decay of the average of RMSprop.", BELOW_ONE)
    OPTIMIZER_EPS = Option(1e-8, "Eps of Adam, AdamW and RMSprop.", Range(min=1e-12, max=1))
    NESTEROV = Option(False, "Nesterov momentum in SGD.")
    LR_SCHEDULER = Option(
        "steps",
        "Schedule of the learning rate; cosine ends at 0, one_cycle begins and ends near it.",
        ("steps", "cosine", "one_cycle"),
    )
    ONE_CYCLE_PEAK = Option(0.3, "When one_cycle reaches BASE_LR, as a share of MAX_ITER.", Range(above=0, max=0.99))
    STEPS = Option([], "Iterations at which the learning rate is multiplied by GAMMA.", ITERATIONS, element=int)
    GAMMA = Option(0.1, "Factor of the learning rate at each of STEPS.", Range(above=0, max=1))
    MAX_ITER = Option(90000, "Number of SGD steps.", ITERATIONS)
    WARMUP_ITERS = Option(1000, "Number of iterations of the linear warm-up.", ITERATIONS_OR_0)
    WARMUP_FACTOR = Option(0.001, "Share of the learning rate at the first iteration of the warm-up.", SHARE)
    WEIGHT_DECAY = Option(1e-4, "Weight decay of weights outside of norm layers.", Range(min=0, limit=10))
    WEIGHT_DECAY_NORM = Option(0.0, "Weight decay of weight and bias of norm layers.", Range(min=0, limit=10))
    WEIGHT_DECAY_NORM_TARGET = Option(0.0, "What weights of norms decay to; biases: 0 (Four Things, 3.3).", (0.0, 1.0))
    WEIGHT_DECAY_BIAS = Option(1e-4, "Weight decay of biases outside of norm layers.", Range(min=0, limit=10))
    FREEZE_NORM_AT = Option(0.0, "When the statistics of norms are frozen; 0: never.", ITERATIONS_OR_0)
    FREEZE_NORM_LAYERS = Option([], "Name prefixes of the layers to freeze, such as backbone.; []: all.")
    FREEZE_NORM_RECOMPUTE = Option(False, "Freeze statistics recomputed as in TEST.RECOMPUTE instead of the EMA's.")
    FREEZE_NORM_AFFINE = Option(False, "Also freeze weight and bias.")
    FREEZE_NORM_WARMUP_ITERS = Option(0, "Number of iterations of a second warm-up, after freezing.", ITERATIONS_OR_0)
    AVERAGE_WEIGHTS = Option("", "Evaluate an average of the weights, with recomputed statistics.", ("", "EMA", "SWA"))
    AVERAGE_WEIGHTS_FROM = Option(0.0, "When the average begins.", ITERATIONS_OR_0)
    AVERAGE_WEIGHTS_DECAY = Option(0.999, "Decay of EMA at each iteration.", BELOW_ONE)
    CHECKPOINT_PERIOD = Option(
        0, "Number of iterations between checkpoints; 0: MAX_ITER / 10, at most 5000.", ITERATIONS_OR_0
    )
    CHECKPOINT_KEEP = Option(
        5, "Number of latest checkpoints to keep, besides model_final and model_best; 0: all.", ITERATIONS_OR_0
    )


class AMP(Section, key="SOLVER.AMP"):
    """Automatic mixed precision; norm statistics stay float32."""

    ENABLED = Option(False, "Train with autocast.")
    DTYPE = Option("bfloat16", "Type in autocast; float16, with loss scaling, needs CUDA.", ("bfloat16", "float16"))


class ClipGradients(Section, key="SOLVER.CLIP_GRADIENTS"):
    """Gradient clipping."""

    ENABLED = Option(False, "Clip gradients before each step.")
    CLIP_TYPE = Option("norm", "What is clipped: the norm of all gradients together, or each value.", ("norm", "value"))
    CLIP_VALUE = Option(1.0, "Largest norm, or absolute value.", Range(above=0, limit=1e6))
