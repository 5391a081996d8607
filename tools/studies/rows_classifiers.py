"""Studies of classifiers: *Rethinking "Batch"*, Tables 1, 2, Figs. 3 to 6 and 8; *Ghost Normalization*, Figs. 4, 5."""

from study import Plot, Row, Study


def _population() -> dict[str, Row]:
    script, sizes = "tools/studies/population.py", (2, 4, 8, 16, 32, 64, 128)
    rows = {f"nbs_{n}": Row(f"{n} of 128", script, ("--norm-batch", str(n)), paper=PAPER.get(n, {})) for n in sizes}
    rows["large"] = Row("32 of 1024", script, ("--norm-batch", "32", "--batch", "1024"), paper=PAPER[1024])
    rows["time"] = Row("CPU time, divided by that of a forward pass", "tools/studies/population_time.py")
    return rows


PAPER = {  # Tables 1 and 2, and Fig. 6, by the normalization batch, or by SGD's: of 256 images, of 8192
    2: {
        **{"EMA of one process": 35.5, "pooled, B = 2": 34.4, "pooled, B = 10": 32.3, "pooled, B = 100": 32.0},
        **{"pooled, B = 1000": 32.0, "exact": 32.0, "frozen": 25.2},
    },
    32: {
        **{"end: EMA": 23.7, "end: N = 10": 28.1, "end: N = 100": 24.0, "end: N = 1000": 23.6, "end: N = 6000": 23.5},
        **{"pooled, B = 100": 23.5, "pooled, B = 1000": 23.5, "exact": 23.5},
    },
    1024: {
        **{"30 %: EMA": 52.8, "30 %: N = 10": 45.5, "30 %: N = 100": 40.1, "30 %: N = 1000": 39.4},
        **{"30 %: N = 6000": 39.4, "end: EMA": 24.0, "end: N = 10": 29.0, "end: N = 100": 24.1},
        **{"end: N = 1000": 23.8, "end: N = 6000": 23.7},
    },
}
NUMBERS = {
    f"{part}: {name}": f"{key}/{name.removeprefix('N = ')}"
    for part, key in (("30 %", "early"), ("end", "end"))
    for name in ("EMA", "N = 10", "N = 100", "N = 1000", "N = 6000")
}
STATISTICS = {
    "training, minibatch": "training/minibatch",
    "validation, minibatch": "validation/minibatch",
    "population": "validation/population",
    "frozen": "validation/frozen",
    "EMA": "validation/EMA",
    "EMA of one process": "validation/EMA of one process",
}
ESTIMATORS = {
    **{f"pooled, B = {b}": f"B/pooled/{b}" for b in (2, 10, 100, 1000)},
    "exact": "B/exact/100",
    **{f"mean of variances, B = {b}": f"B/mean_of_variances/{b}" for b in (2, 10, 100, 1000)},
}
TIMES = {f"time of {name}": name for name in ("pooled", "exact", "layer by layer")}
TIME = "Time on a ResNet-50, 53 norms, 32 images of 64 pixels in 4 batches"
NORM_BATCH = "images normalized together, of 128"
CURVES = ("training", "EMA", "EMA of one process", "recomputed")
EPOCHS = {f"{name}, epoch {k}": f"curve/{name}/{k}" for name in CURVES for k in range(1, 11)}


Points = dict[str, list[tuple[float, str, str]]]  # what a Plot draws


def _over_training(row: str) -> Points:
    return {name: [(float(k), row, f"{name}, epoch {k}") for k in range(1, 11)] for name in CURVES}


def _by_norm_batch(*columns: str) -> Points:
    return {column: [(float(n), f"nbs_{n}", column) for n in (2, 4, 8, 16, 32, 64, 128)] for column in columns}


def _by_estimator(row: str) -> Points:
    sizes, constant = (2, 10, 100, 1000), ("exact", "EMA", "EMA of one process")
    methods = ("pooled", "mean of variances")
    points: Points = {method: [(float(b), row, f"{method}, B = {b}") for b in sizes] for method in methods}
    return points | {name: [(float(b), row, name) for b in (sizes[0], sizes[-1])] for name in constant}


def _landscape() -> dict[str, Row]:
    script, data = "tools/studies/landscape.py", "$FASHION_MNIST/train-{}-ubyte.gz"
    files = f"[{data.format('images-idx3')}:{data.format('labels-idx1')}]"
    names = {"BN": "BN", "GhostBN": "GhostBN, 8 groups", "SeqNorm": "SeqNorm, 4 x 8 groups", "GN": "GN", "": "no norm"}
    return {
        f"{network}_{norm or 'none'}": Row(
            f"{title}: {label}",
            script,
            (
                *("--config-file", f"configs/studies/landscape/{network}.yaml", "--every", "4"),
                *("MODEL.BACKBONE.NORM", norm, "DATASETS.TRAIN", files),
            ),
        )
        for network, title in (("simplenet", "Fig. 4, linear layers"), ("resnet", "Fig. 5, residual network"))
        for norm, label in names.items()
        if norm or network == "simplenet"  # the other one diverges without
    }


STEPS = range(0, 60, 4)
EDGE_NAMES = ("smallest", "largest")
EDGES = {f"{edge} loss, step {k}": f"{edge}/{k}" for edge in EDGE_NAMES for k in STEPS}


def _bands(network: str, *norms: str) -> dict[str, tuple[list[tuple[float, str, str]], ...]]:
    """From the smallest to the largest loss."""
    return {
        norm: tuple([(float(k), f"{network}_{norm}", f"{edge} loss, step {k}") for k in STEPS] for edge in EDGE_NAMES)
        for norm in norms
    }


FIGURE_8_STEPS = range(150, 1501, 150)  # at which it is evaluated
FIGURE_8 = {
    "population": "population",
    "recomputed": "recomputed",
    "minibatch, i.i.d.": "minibatch",
    "minibatch as in training": "minibatch as in training",
}


def _figure8() -> dict[str, Row]:
    script, one = "tools/studies/figure8.py", "population"
    return {
        "iid": Row("BN, i.i.d.", script, ("--classes", "0"), paper={one: 78.3}),
        "16x2": Row("BN, 16 classes x 2", script, ("--classes", "16"), paper={one: 67.0}),
        "8x4": Row("BN, 8 classes x 4", script, ("--classes", "8")),
        "4x8": Row("BN, 4 classes x 8", script, ("--classes", "4")),
        "ghost": Row("8 x 4, GhostBN of 8 different classes", script, ("--groups", "8"), paper={one: 77.4}),
        "shuffle": Row("8 x 4, shuffled over the eight batches", script, ("--shuffle",)),
        "all": Row("8 x 4, BN over all eight batches", script, ("--norm", "BN")),
        "brn": Row("8 x 4, Batch Renorm", script, ("--norm", "BRN"), paper={one: 78.6}),
        "gn": Row("8 x 4, GroupNorm", script, ("--norm", "GN")),
        "iid_gn": Row("i.i.d., GroupNorm", script, ("--classes", "0", "--norm", "GN")),
    }


def _figure8_fashion() -> dict[str, Row]:
    def row(title: str, *options: str) -> Row:
        return Row(title, "tools/studies/figure8.py", ("--data", "$FASHION_MNIST", *options))

    return {
        "iid": row("BN, i.i.d.", "--classes", "0"),
        "4x8": row("BN, 4 classes x 8", "--classes", "4"),
        "2x16": row("BN, 2 classes x 16", "--classes", "2"),
        "ghost": row("2 x 16, GhostBN of 2 different classes", "--classes", "2", "--groups", "2"),
        "shuffle": row("2 x 16, shuffled over the eight batches", "--classes", "2", "--shuffle"),
        "all": row("2 x 16, BN over all eight batches", "--classes", "2", "--norm", "BN"),
        "brn": row("2 x 16, Batch Renorm", "--classes", "2", "--norm", "BRN"),
        "gn": row("2 x 16, GroupNorm", "--classes", "2", "--norm", "GN"),
        "iid_gn": row("i.i.d., GroupNorm", "--classes", "0", "--norm", "GN"),
    }


def _figure8_plots() -> list[Plot]:
    """Accuracies over the training, as the figure has them, and the remedies."""

    def curve(row: str, name: str) -> list[tuple[float, str, str]]:
        return [(k, row, f"{name}, step {k}") for k in FIGURE_8_STEPS]

    plots = [
        Plot(title, "step", "accuracy, %", {name: curve(row, name) for name in list(FIGURE_8)[1:]})
        for row, title in (("16x2", "16 classes x 2"), ("8x4", "8 classes x 4"), ("4x8", "4 classes x 8"))
    ]
    rows = {"8 x 4": "8x4", "GhostBN": "ghost", "shuffled": "shuffle", "all batches": "all", "Batch Renorm": "brn"}
    rows |= {"i.i.d.": "iid"}
    remedies = {label: curve(row, "population") for label, row in rows.items()}
    return [*plots, Plot("8 x 4: remedies, population statistics", "step", "accuracy, %", remedies)]


def _contrastive() -> dict[str, Row]:
    def row(title: str, *options: str, processes: int = 2) -> Row:
        return Row(title, "tools/studies/contrastive.py", options, processes)

    return {
        "bn": row("BN of 8 images"),
        "shuffled": row("… keys shuffled", "--keys", "shuffled"),
        "population": row("… keys under moving averages", "--keys", "population"),
        "syncbn": row("SyncBN", "--norm", "SyncBN"),
        "gn": row("GroupNorm", "--norm", "GN"),
        "untrained": row("BN, untrained", "--rate", "0", "--steps", "100", "--processes", "1", processes=1),
    }


STUDIES = {
    "population": Study(
        "Population statistics: Tables 1 and 2, Figs. 3 to 6",
        "A ResNet of nine blocks on 6144 images of Fashion-MNIST at half resolution (where it is not installed, of the "
        "built-in `patches`). Each image is multiplied by a log-normal number (standard deviation of its logarithm "
        "1.5). 10 epochs; the learning rate is 0.2 for 128 images, in proportion for others, rises over 5 % of the "
        "steps and falls linearly to 0. A row says how many images are normalized together, of how many in an SGD "
        "step. Errors are in percent, on 5120 validation images unless it says *training*. *EMA* averages all images "
        "of a step, as this library does; *of one process* averages the first normalization batch of each step, as "
        "one of many processes does. *Frozen*: the statistics are frozen for the last fifth of the training. "
        "*Population*: recomputed from N = 6000 images in batches of B = 1000. Table 1 has B = 100, Table 2 and Figs. "
        "3 and 4 have N = 1000. The paper's figures are of a ResNet-50 on ImageNet with 256 images a step, beside our "
        "1024 with 8192; its largest N is 10000.",
        _population(),
        STATISTICS | ESTIMATORS | NUMBERS | TIMES | EPOCHS,
        tables={
            "Figs. 5 and 6: the normalization batch": list(STATISTICS),
            "Table 2: in batches of how many images": [*list(STATISTICS)[-2:], *list(ESTIMATORS)[:5]],
            "Table 2, by the mean of variances": list(ESTIMATORS)[5:],
            "Table 1: from how many images, after 30 % of the training": list(NUMBERS)[:5],
            "Table 1: at the end": list(NUMBERS)[5:],
            TIME: list(TIMES),
        },
        plots=(
            Plot("Fig. 3: 32 of 128", "epoch", "error, %", _over_training("nbs_32")),
            Plot("Fig. 4: 32 of 1024", "epoch", "error, %", _over_training("large")),
            Plot("Fig. 5", NORM_BATCH, "error, %", _by_norm_batch(*list(STATISTICS)[:3]), log=True),
            Plot("Fig. 6", NORM_BATCH, "validation error, %", _by_norm_batch(*list(STATISTICS)[1:4]), log=True),
            Plot("Table 2: trained with 2 of 128", "B", "validation error, %", _by_estimator("nbs_2"), log=True),
            Plot("Table 2: trained with 32 of 128", "B", "validation error, %", _by_estimator("nbs_32"), log=True),
        ),
        unit="error, %",
    ),
    "landscape": Study(
        "The loss along the gradient: Ghost Normalization, Figs. 4 and 5",
        "At every fourth of 60 steps on Fashion-MNIST, the loss of the step's images is computed at the weights that "
        "learning rates of a quarter to twice that of the step would lead to. The figures are the largest loss minus "
        "the smallest. Fig. 4: linear layers of 512 and 300, 512 images a step, plain SGD at 0.4. Fig. 5: a "
        "ResNet-8 at half resolution, 256 images, one cycle up to 1. The paper: GhostNorm's loss is rougher than "
        "that of BatchNorm, on MNIST as rough as without a norm, and on CIFAR-10 towards the end only; it "
        "generalizes better all the same.",
        _landscape(),
        {"steps 0 to 24": "width/first half", "steps 28 to 56": "width/second half"} | EDGES,
        {"FASHION_MNIST": "the folder of its four files, such as /usr/share/datasets/fashion-mnist"},
        tables={"": ["steps 0 to 24", "steps 28 to 56"]},
        plots=(
            Plot("Fig. 4", "step", "loss along the gradient", bands=_bands("simplenet", "BN", "GhostBN", "none")),
            Plot("Fig. 4", "step", "loss along the gradient", bands=_bands("simplenet", "BN", "SeqNorm", "GN")),
            Plot("Fig. 5", "step", "loss along the gradient", bands=_bands("resnet", "BN", "GhostBN")),
            Plot("Fig. 5", "step", "loss along the gradient", bands=_bands("resnet", "BN", "SeqNorm", "GN")),
        ),
        unit="loss",
    ),
    "figure8": Study(
        "Fig. 8: normalization batches of few classes",
        "A network of three hidden layers of 256 channels on generated images of 64 classes. Each image is the sum "
        "of one of its class and one of another class at 95 % of the contrast: the image alone hardly shows which "
        "of the two is the label, a batch with more images of the class does. 1500 steps of Adam, each on eight "
        "normalization batches of 32 images, k classes x m images. The paper: the model learns to use the other "
        "images of its class, and fails under population statistics and in i.i.d. minibatches; normalization "
        "batches of different classes repair it. The paper's figures here are of *Batch Renormalization*, Fig. 3, "
        "where the experiment comes from: Inception v3, 16 x 2 of 1000 classes.",
        _figure8(),
        {name: f"final/{path}" for name, path in FIGURE_8.items()}
        | {f"{name}, step {k}": f"steps/{k}/{path}" for name, path in FIGURE_8.items() for k in FIGURE_8_STEPS},
        tables={"": list(FIGURE_8)},
        plots=_figure8_plots(),
        unit="accuracy, %",
    ),
    "figure8_fashion": Study(
        "Fig. 8 on real images",
        "As `figure8.md`, with sums of two images of Fashion-MNIST, 14 x 14 pixels, 10 classes. Photographs differ in "
        "contrast, so that a sum hardly shows which of its two classes is the label: from one image alone, hardly more "
        "than 50 % can be right.",
        _figure8_fashion(),
        {name: f"final/{path}" for name, path in FIGURE_8.items()},
        {"FASHION_MNIST": "the folder of Fashion-MNIST, as of Debian's package dataset-fashion-mnist"},
        unit="accuracy, %",
    ),
    "contrastive": Study(
        "§6.2: a small MoCo, and which images its keys are normalized with",
        "An encoder of three hidden layers of 256 channels is trained on 20000 images of Fashion-MNIST, 14 x 14 "
        "pixels, without labels: it has to find the key of another view of the same image among 1024 others. 1200 "
        "steps of 128 images on two processes, each with eight normalization batches of 8 images. Columns: accuracy"
        " of this task under the statistics of training and under population statistics, and of classifiers on the "
        "features, under population statistics. The paper: minibatch statistics leak which key belongs to a query, "
        "so that the task is solved without learning features; shuffled keys, SyncBN, or moving averages for the "
        "keys prevent it.",
        _contrastive(),
        {
            "training task, as in training": "pretext in training",
            "training task, population": "pretext",
            "kNN": "kNN",
            "linear": "linear",
        },
        unit="accuracy, %",
    ),
}
