"""What each study trains, and what the paper has found: the rows of run.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

TABLE_5 = "configs/studies/table5"
TABLE_6 = "configs/studies/table6"


@dataclass(frozen=True)
class Row:
    """One training, or one evaluation of what another row has trained.

    Attributes:
        title: in the table.
        config: file, from the root of the project; or a script that takes `--seed` and `--out FOLDER`, and writes
            `results.json` there.
        options: KEY VALUE pairs over the config, or the script's arguments.
        processes: how many train together.
        weights_of: the row that trains what this one evaluates, `../STUDY/ROW` for one of another study; a script gets
            the folder of that run, too.
        results_of: the row whose run has these figures, too: nothing is run for this one.
        columns: the study's columns that are elsewhere in this row's results.
        paper: the paper's figure for each column; None: it has none.
    """

    title: str
    config: str = ""
    options: tuple[str, ...] = ()
    processes: int = 1
    weights_of: str = ""
    results_of: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    paper: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Plot:
    """Curves of the means over the seeds.

    Attributes:
        title, x, y: of it and of its axes.
        curves: label -> its points, each an x, a row and a column of the study.
        log: whether x has a logarithmic scale.
        bands: label -> the points of its lower and of its upper edge.
    """

    title: str
    x: str
    y: str
    curves: Mapping[str, Sequence[tuple[float, str, str]]] = field(default_factory=dict)
    log: bool = False
    bands: Mapping[str, tuple[Sequence[tuple[float, str, str]], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A table of the paper in small.

    Attributes:
        title: of the report.
        about: what is trained, and what is claimed.
        rows: by their names.
        columns: title -> path in `results.json`, such as `"population/bbox/AP"`.
        tables: title -> the columns that it shows; without any, one table has all columns.
        data: environment variables that it needs, and what each is.
        plots: curves; without any, the report has bars of all rows and columns.
        unit: of the columns.
        details: columns of every table only, words or other figures, likewise.
    """

    title: str
    about: str
    rows: Mapping[str, Row]
    columns: dict[str, str]
    data: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Sequence[str]] = field(default_factory=dict)
    plots: Sequence[Plot] = ()
    unit: str = "AP"
    details: Mapping[str, str] = field(default_factory=dict)

    def value(self, row: str, results: Mapping[str, Any], column: str) -> float | None:
        """The figure of a row in what its run has written; None where it has none."""
        found = self.entry(row, results, column)
        return found if isinstance(found, (int, float)) else None

    def entry(self, row: str, results: Mapping[str, Any], column: str) -> Any:
        """What a run has written for a column, or a detail; None where there is nothing."""
        found: Any = results
        for part in {**self.columns, **self.details, **self.rows[row].columns}[column].split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    def headline(self, row: str, results: Mapping[str, Any]) -> str:
        """The columns of the first table in one line."""
        shown = next(iter(self.tables.values()), self.columns)
        values = ((column, self.value(row, results, column)) for column in shown)
        return ", ".join(f"{column} {value:.1f}" for column, value in values if value is not None)


def _table6(data: tuple[str, ...] = ()) -> dict[str, Row]:
    one, two = "population AP", "minibatch AP"

    def row(title: str, config: str, images: int = 4, processes: int = 1, paper: tuple[float, ...] = ()) -> Row:
        """Of `images` normalized together on each process, of four in a step."""
        options = ("SOLVER.ACCUMULATE", str(4 // images // processes), *data)
        figures = dict(zip((one, two), paper, strict=False))
        return Row(title, f"{TABLE_6}/{config}.yaml", options, processes, paper=figures)

    return {
        "bn_1_image": row("BN, RoIs of 1 image", "bn", 1, paper=(30.7, 41.5)),
        "bn_2_images": row("BN, RoIs of 2 images", "bn", 2, paper=(40.1, 41.3)),
        "bn_4_images": row("BN, RoIs of 4 images", "bn"),
        "bn_2_processes": row("BN, 1 image on each of 2 processes", "bn", 1, 2),
        "shuffle": row("… RoIs shuffled", "shuffle", 1, 2, paper=(41.7,)),
        "syncbn": row("… SyncBN", "syncbn", 1, 2),
        "bn_2_processes_2_images": row("BN, 2 images on each of 2 processes", "bn", 2, 2),
        "shuffle_2_images": row("… RoIs shuffled", "shuffle", 2, 2, paper=(41.6,)),
        "syncbn_2_images": row("… SyncBN", "syncbn", 2, 2, paper=(41.7,)),
        "bn_4_processes": row("BN, 1 image on each of 4 processes", "bn", 1, 4),
        "shuffle_4_processes": row("… RoIs shuffled", "shuffle", 1, 4),
        "gn": row("GroupNorm", "gn", paper=(41.4,)),
        "none": row("no norm", "none", paper=(41.1,)),
    }


def _table5(data: tuple[str, ...] = ()) -> dict[str, Row]:
    one = "population AP"
    choices = {  # SGD, population, affine: AP of the paper
        "row1": ("shared", "shared", "shared", 39.1),
        "row2": ("shared", "per domain", "shared", 2.1),
        "row3": ("per domain", "shared", "shared", 34.1),
        "row4": ("per domain", "per domain", "shared", 39.1),
        "row5": ("per domain", "shared", "per domain", 35.5),
        "row6": ("per domain", "per domain", "per domain", 39.2),
    }
    rows = {
        name: Row(f"{name[-1]}: {sgd} / {population} / {affine}", f"{TABLE_5}/{name}.yaml", data, paper={one: ap})
        for name, (sgd, population, affine, ap) in choices.items()
    }
    rows["gn"] = Row("GroupNorm", f"{TABLE_5}/gn.yaml", data, paper={one: 39.5})
    rows["none"] = Row("no norm", f"{TABLE_5}/none.yaml", data, paper={one: 38.7})
    return rows


def _shift() -> dict[str, Row]:
    config = "configs/studies/shift/base.yaml"
    val = {name: _cells(name, "val") for name in ("pbc", "bccd")}
    both = ("DATASETS.TEST", f"[{val['pbc']}, {val['bccd']}]")
    pbc = ("DATASETS.TRAIN", f"[{_cells('pbc', 'train')}]")
    weighed = ("TEST.STATISTICS", "[population]", "TEST.EXAMPLE_WEIGHTS", "[0.0, 0.1, 0.2, 0.4, 0.7, 1.0]")

    def under(statistics: str) -> dict[str, str]:
        return {f"AP on {name}": f"{statistics}/{name}/bbox/AP" for name in ("pbc", "bccd")}

    return {
        "pbc": Row("trained on pbc: population statistics", config, (*pbc, *both)),
        "minibatch": Row("… minibatch statistics of each test image", results_of="pbc", columns=under("minibatch")),
        "weighed": Row(
            "… both, weighed (Four Things); the weight is chosen on pbc",
            config,
            (*pbc, *both, *weighed, "TEST.EXAMPLE_WEIGHT_DATASET", val["pbc"].partition("=")[2]),
            weights_of="pbc",
            columns=under("population_weighed"),
        ),
        "adapted": Row(
            "… population statistics of 300 images of bccd, without labels",
            "examples/adapt_domain.py",
            ("--source", val["pbc"], "--target", val["bccd"], "--unlabelled", _cells("bccd", "train")),
            weights_of="pbc",
            columns=under("target"),
        ),
        "nearest": Row("… of either, by the nearest for each image", results_of="adapted", columns=under("nearest")),
        "bccd": Row(
            "trained on bccd: population statistics",
            config,
            ("DATASETS.TRAIN", f"[{_cells('bccd', 'train')}]", *both),
        ),
        "bccd_minibatch": Row(
            "… minibatch statistics of each test image", results_of="bccd", columns=under("minibatch")
        ),
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


def _cells(laboratory: str, part: str) -> str:
    """Its images, as a data set of that name; `part` is train or val."""
    folder = "$BLOOD" if laboratory in ("pbc", "bccd") else "$NUCLEI"
    return f"{laboratory}={folder}/{part}_{laboratory}.json:{folder}/images"


def _table5_blood() -> dict[str, Row]:
    """As `configs/domains.yaml`, on one laboratory."""
    data = ("DATASETS.TRAIN", f"[{_cells('pbc', 'train')}]", "DATASETS.TEST", f"[{_cells('pbc', 'val')}]")
    size = ("INPUT.MIN_SIZE_TRAIN", "[160]", "INPUT.MAX_SIZE_TRAIN", "240", "INPUT.MIN_SIZE_TEST", "160")
    anchors = ("INPUT.MAX_SIZE_TEST", "240", "MODEL.ANCHOR_GENERATOR.SIZES", "[16, 32, 64, 128, 192]")
    return _table5((*data, *size, *anchors, "SOLVER.MAX_ITER", "400"))


def _table6_cells() -> dict[str, Row]:
    """Real images whose objects tell their laboratory: all four domains of blood and nuclei, mixed."""
    laboratories = ("pbc", "bccd", "fluorescence", "stain")
    train, val = (", ".join(_cells(name, part) for name in laboratories) for part in ("train", "val"))
    data = ("DATASETS.TRAIN", f"[{train}]", "DATASETS.TEST", f"[{val}]", "DATASETS.LABELS", "union")
    domains = ("DATASETS.DOMAINS", f"[{', '.join(laboratories)}]")
    size = ("INPUT.MIN_SIZE_TRAIN", "[160]", "INPUT.MAX_SIZE_TRAIN", "240", "INPUT.MIN_SIZE_TEST", "160")
    anchors = ("INPUT.MAX_SIZE_TEST", "240", "MODEL.ANCHOR_GENERATOR.SIZES", "[6, 10, 16, 26, 42]")
    rows = _table6((*data, *domains, *size, *anchors))
    return {name: rows[name] for name in ("bn_1_image", "bn_4_images", "bn_2_processes", "shuffle", "syncbn", "gn")}


BLOOD = {"BLOOD": "the folder of TXL-PBC in COCO format, {train,val}_{pbc,bccd}.json and images/"}
NUCLEI = {"NUCLEI": "the folder of the nuclei in COCO format, {train,val}_{fluorescence,stain}.json and images/"}


_SOUND = ("--sound", "table5/row4")


def _audit() -> dict[str, Row]:
    def of(fault: str, title: str, weights: str = "table5/row4", *options: str) -> Row:
        return Row(title, "tools/studies/audit_cost.py", (fault, *options), weights_of=f"../{weights}")

    return {
        "sound": of("as_trained", "none"),
        "never_updated": of("never_updated", "statistics of construction: mean 0, variance 1"),
        "frozen_initial": of("frozen_initial", "… of a frozen backbone"),
        "small_momentum": of("small_momentum", "momentum 0.001: half of them is left"),
        "few_updates": of("few_updates", "ten updates: a third is left"),
        "nan": of("nan", "NaN in one channel"),
        "zero_variance": of("zero_variance", "variance 0 in one of 16 channels of a layer"),
        "one_layer": of("one_layer", "ten times the variances in one layer of the head"),
        "row_3": of("as_trained", "population statistics shared by levels (row 3)", "table5/row3", *_SOUND),
        "row_2": of("as_trained", "SGD statistics shared by levels (row 2)", "table5/row2", *_SOUND),
        "other_statistics": of("other_statistics", "statistics of dark images"),
        "other_images": of("other_images", "statistics of light images, tested on dark ones"),
        "raw_pixels": of("raw_pixels", "pixels not normalized as in training"),
        "averaged": of("averaged", "averaged weights, statistics of the last"),
        "padding": of("padding", "statistics of padded images of many sizes"),
        "large_eps": of("large_eps", "eps 0.001 for 1e-5"),
        "left_in_training": of("left_in_training", "left in training mode for 40 single images"),
        "last_batch": of("last_batch", "statistics of one batch of 8"),
        "half": of("half", "statistics rounded to float16"),
        "leak": of(
            *("as_trained", "RoIs of one image in the box head", "table6/bn_1_image"),
            *("--leak", "--sound", "table6/bn_4_images", "--repaired", "table6/shuffle"),
        ),
        "few_samples": of(
            *("as_trained", "RoIs of two images in the box head", "table6/bn_2_images"),
            *("--leak", "--sound", "table6/bn_4_images", "--repaired", "table6/bn_4_images"),
        ),
    }


def _peers() -> dict[str, Row]:
    rows = {
        "domainnorm": Row("this library", "tools/studies/peer_domainnorm.py", ("--data", "$BLOOD")),
        "torchvision": Row("torchvision's RetinaNet", "tools/studies/peer_torchvision.py", ("--data", "$BLOOD")),
        "ultralytics": Row(
            "ultralytics' YOLO11n",
            "tools/studies/peer_ultralytics.py",
            ("--data", "$BLOOD", "--python", "$YOLO_PYTHON", "--epochs", "33"),
        ),
    }
    plain = {
        f"{name}_plain": replace(row, title="… without augmentation", options=(*row.options, "--plain"))
        for name, row in rows.items()
    }
    return {name: row for key in rows for name, row in ((key, rows[key]), (f"{key}_plain", plain[f"{key}_plain"]))}


COLUMNS = {"population AP": "population/bbox/AP", "minibatch AP": "minibatch/bbox/AP"}
ALL_COLUMNS = COLUMNS | {"recomputed AP": "recomputed/bbox/AP"}

STUDIES = {
    "table6": Study(
        "Tables 3 and 6: which RoIs are normalized together",
        "Faster R-CNN, ResNet-18 with GroupNorm, box head of four convolutions, random weights, 600 steps of 4 images "
        "of 128 pixels of the built-in data set `herds`: all objects of an image are of one class, which each of them "
        "hardly shows. The paper: with the RoIs of one image in a normalization batch the head learns to read the "
        "others, and fails in inference; RoIs shuffled over the processes, or SyncBN, repair it.",
        _table6(),
        COLUMNS,
    ),
    "table5": Study(
        "Table 5: a head shared by pyramid levels, on `shapes`",
        "RetinaNet, ResNet-18, five levels, random weights, 700 steps of 8 images of the built-in data set, as "
        "`configs/quickstart.yaml`. A row says what the levels share: SGD statistics / population statistics / affine. "
        "The paper: rows 1, 4 and 6, where training and inference agree, work; rows 2, 3 and 5 fail.",
        _table5(),
        ALL_COLUMNS,
    ),
    "table5_blood": Study(
        "Table 5 on blood cells",
        "As Table 5 on `shapes`, from random weights, 400 steps of 8 images of 160 pixels of one laboratory, pbc, of "
        "TXL-PBC.",
        _table5_blood(),
        ALL_COLUMNS,
        BLOOD,
    ),
    "table6_cells": Study(
        "Table 6 on cells of four laboratories",
        "As Table 6 on `herds`, 600 steps of 4 images of 160 pixels of blood cells (TXL-PBC: pbc, bccd) and nuclei "
        "(2018 Data Science Bowl: fluorescence, stain), mixed: the RoIs of an image tell its laboratory, and that "
        "which classes it has. AP over all classes and images.",
        _table6_cells(),
        {"population AP": "population/overall/bbox/AP", "minibatch AP": "minibatch/overall/bbox/AP"},
        BLOOD | NUCLEI,
    ),
    "shift": Study(
        "Domain shift: trained in one laboratory, tested in another",
        "RetinaNet, ResNet-18 with BN in backbone and head, random weights, 800 steps of 4 images of blood cells "
        "(TXL-PBC: the laboratories pbc and bccd), as `configs/coco_folder.yaml`. The paper, Table 4: "
        "statistics of the source fail on a target, those of the target repair some of it.",
        _shift(),
        {"AP on pbc": "population/pbc/bbox/AP", "AP on bccd": "population/bccd/bbox/AP"},
        BLOOD,
    ),
    "audit": Study(
        "What the findings of the audit cost",
        "Faults planted in a detector that was trained on the built-in data set `shapes` (row 4 of `table5`, the "
        "quickstart), or that it was trained with (other rows of `table5`, and of `table6`). AP is of population "
        "statistics. `dn.audit` looks at 64 images; the remedy is that of the finding that comes first.",
        _audit(),
        {"before": "before", "after the remedy": "after", "sound model": "sound"},
        details={"named first": "named", "remedy": "remedy"},
    ),
    "peers": Study(
        "What a user would pick instead, in the same CPU time",
        "Blood cells of one laboratory (pbc), tested on its images and on those of another (bccd): random weights, one "
        "thread, 256 pixels, batches of 4. This library: `configs/studies/shift/base.yaml`, 800 steps. torchvision: "
        "ResNet-18, pyramid of 64 channels, no norm in the head, the same optimizer, sizes and steps. ultralytics: "
        "`yolo11n.yaml`, its defaults, 33 epochs. Augmentation is what each does by itself: three sizes and flips; "
        "mosaic, colors, scales, shifts and flips for YOLO. Scored by the same COCO evaluation; CPU seconds are those "
        "of training.",
        _peers(),
        {
            "pbc": "population/pbc/bbox/AP",
            "bccd": "population/bccd/bbox/AP",
            "pbc, minibatch statistics": "minibatch/pbc/bbox/AP",
            "bccd, minibatch statistics": "minibatch/bccd/bbox/AP",
        },
        BLOOD
        | {
            "YOLO_PYTHON": "the Python of an environment with ultralytics, which needs nothing of this library",
        },
        details={"CPU seconds": "cpu_seconds"},
    ),
    "population": Study(
        "Population statistics: Tables 1 and 2, Figs. 3 to 6",
        "A ResNet of nine blocks on 6144 images of Fashion-MNIST at half resolution (where it is not there, of the "
        "built-in `patches`), each multiplied by a log-normal number (standard deviation of its logarithm 1.5); 10 "
        "epochs, SGD with learning rate 0.2 for 128 images, proportional to them, which rises over 5 % of the "
        "steps and falls linearly to 0. A row is how many images are normalized together, of how many in an SGD "
        "step. Errors in percent, of 5120 validation images unless *training* is said. *EMA*: of all images of a "
        "step, as this library keeps it; *of one process*: of the first normalization batch of each step, as one "
        "of many processes would. *Frozen*: the last fifth of the training with the statistics frozen. "
        "*Population*: recomputed from N = 6000 images in batches of B = 1000; in Table 1, B = 100; in Table 2, N "
        "= 1000, as over the training. The paper's figures are of ResNet-50 on ImageNet, 256 images a step; beside "
        "our 1024, 8192; beside our N = 6000, N = 10000.",
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
        "Every fourth of 60 steps on Fashion-MNIST, the loss of the step's images is computed where learning "
        "rates of a quarter to twice that of the step would lead along the gradient; the figures are the largest "
        "minus the smallest. Fig. 4: linear layers of 512 and 300, 512 images a step, plain SGD at 0.4. Fig. 5: a "
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
            Plot("Fig. 5", "step", "loss along the gradient", bands=_bands("resnet", "BN", "GhostBN", "none")),
            Plot("Fig. 5", "step", "loss along the gradient", bands=_bands("resnet", "BN", "SeqNorm", "GN")),
        ),
        unit="loss",
    ),
    "figure8": Study(
        "Fig. 8: normalization batches of few classes",
        "A network of three hidden layers of 256 channels on generated images of 64 classes, each image the sum of one "
        "of its class and one of another class at 95 % of its contrast: which of them is meant is hard to see in it, "
        "and easy to see in a batch that has more of its class. 1500 steps of Adam, each on eight normalization "
        "batches of 32 images, of k classes x m images. "
        "The paper: the model learns to use the other images of a class, and fails under population statistics and "
        "in i.i.d. minibatches; normalization batches of different classes repair it. The paper's figures here are "
        "of *Batch Renormalization*, Fig. 3, where the experiment comes from: Inception v3, 16 x 2 of 1000 classes.",
        _figure8(),
        {name: f"final/{path}" for name, path in FIGURE_8.items()}
        | {f"{name}, step {k}": f"steps/{k}/{path}" for name, path in FIGURE_8.items() for k in FIGURE_8_STEPS},
        tables={"": list(FIGURE_8)},
        plots=_figure8_plots(),
        unit="accuracy, %",
    ),
    "figure8_fashion": Study(
        "Fig. 8 on real images",
        "As `figure8.md`, on sums of two images of Fashion-MNIST of 14 x 14 pixels, of the 10 classes. Photographs "
        "differ in contrast, so that a sum hardly tells which of its two classes is meant: alone, a model can hardly "
        "do better than 50 %.",
        _figure8_fashion(),
        {name: f"final/{path}" for name, path in FIGURE_8.items()},
        {"FASHION_MNIST": "the folder of Fashion-MNIST, as of Debian's package dataset-fashion-mnist"},
        unit="accuracy, %",
    ),
    "contrastive": Study(
        "§6.2: a small MoCo, and which images its keys are normalized with",
        "An encoder of three hidden layers of 256 channels learns on 20000 images of Fashion-MNIST of 14 x 14 pixels, "
        "without labels, to find the key of another view of the same image among 1024 others: 1200 steps of 128 images "
        "on two processes, each with eight normalization batches of 8 images. The training task under the statistics "
        "of training and under those of the population, and classifiers on the features under the latter. "
        "The paper: minibatch statistics leak which key belongs to a query, so that the task is solved without "
        "learning features; a shuffle of the keys, SyncBN, or moving averages in the branch of the keys prevent it.",
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
