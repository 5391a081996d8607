"""What each study trains, and what the paper has found: the rows of run.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        weights_of: the row that trains what this one evaluates.
        paper: the paper's figure for each column; None: it has none.
    """

    title: str
    config: str
    options: tuple[str, ...] = ()
    processes: int = 1
    weights_of: str = ""
    paper: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Plot:
    """Curves of the means over the seeds.

    Attributes:
        title, x, y: of it and of its axes.
        curves: label -> its points, each an x, a row, and a column of the study or a path in `results.json`.
        log: whether x has a logarithmic scale.
    """

    title: str
    x: str
    y: str
    curves: Mapping[str, Sequence[tuple[float, str, str]]]
    log: bool = False


@dataclass(frozen=True)
class Study:
    """A table of the paper in small.

    Attributes:
        title: of the report.
        about: what is trained, and what is claimed.
        rows: by their names.
        columns: title -> path in `results.json`, such as `"population/bbox/AP"`.
        data: environment variables that it needs, and what each is.
        plots: curves; without any, the report has bars of all rows and columns.
        unit: of the columns.
    """

    title: str
    about: str
    rows: Mapping[str, Row]
    columns: Mapping[str, str]
    data: Mapping[str, str] = field(default_factory=dict)
    plots: Sequence[Plot] = ()
    unit: str = "AP"

    def value(self, results: Mapping[str, Any], column: str) -> float | None:
        """The figure of a column, or at a path, in what a run has written; None where it has none."""
        found: Any = results
        for part in self.columns.get(column, column).split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found if isinstance(found, (int, float)) else None

    def headline(self, results: Mapping[str, Any]) -> str:
        """All columns in one line."""
        values = ((column, self.value(results, column)) for column in self.columns)
        return ", ".join(f"{column} {value:.1f}" for column, value in values if value is not None)


def _table6() -> dict[str, Row]:
    one, two = "population AP", "minibatch AP"
    return {
        "bn_1_image": Row("BN, RoIs of 1 image", f"{TABLE_6}/bn_1_image.yaml", paper={one: 30.7, two: 41.5}),
        "bn_2_images": Row("BN, RoIs of 2 images", f"{TABLE_6}/bn_2_images.yaml", paper={one: 40.1, two: 41.3}),
        "bn_4_images": Row("BN, RoIs of 4 images", f"{TABLE_6}/bn_4_images.yaml"),
        "bn_2_processes": Row(
            "BN, 1 image on each of 2 processes", f"{TABLE_6}/bn_1_image.yaml", ("SOLVER.ACCUMULATE", "2"), processes=2
        ),
        "shuffle": Row("… RoIs shuffled", f"{TABLE_6}/shuffle_1_image.yaml", processes=2, paper={one: 41.7}),
        "syncbn": Row("… SyncBN", f"{TABLE_6}/syncbn.yaml", processes=2, paper={one: 41.7}),
        "gn": Row("GroupNorm", f"{TABLE_6}/gn.yaml", paper={one: 41.4}),
        "none": Row("no norm", f"{TABLE_6}/none.yaml", paper={one: 41.1}),
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
    train = {name: f"$BLOOD/train_{name}.json:$BLOOD/images" for name in ("pbc", "bccd")}
    val = {name: f"{name}=$BLOOD/val_{name}.json:$BLOOD/images" for name in ("pbc", "bccd")}
    both = ("DATASETS.TEST", f"[{val['pbc']}, {val['bccd']}]")
    recomputed = ("TEST.STATISTICS", "[recomputed]", "TEST.RECOMPUTE.NUM_SAMPLES", "300", "TEST.RECOMPUTE.DATASET")
    weighed = ("TEST.STATISTICS", "[population]", "TEST.EXAMPLE_WEIGHTS", "[0.0, 0.1, 0.2, 0.4, 0.7, 1.0]")
    return {
        "pbc": Row("trained on pbc", config, ("DATASETS.TRAIN", f"[{train['pbc']}]", *both)),
        "recomputed": Row(
            "… statistics recomputed on bccd, without labels",
            config,
            ("DATASETS.TRAIN", f"[{train['pbc']}]", *both, *recomputed, train["bccd"]),
            weights_of="pbc",
        ),
        "weighed": Row(
            "… inference example weighing, its weight chosen on pbc",
            config,
            (
                *("DATASETS.TRAIN", f"[{train['pbc']}]", "DATASETS.TEST", f"[{val['bccd']}]"),
                *(*weighed, "TEST.EXAMPLE_WEIGHT_DATASET", val["pbc"].partition("=")[2]),
            ),
            weights_of="pbc",
        ),
        "bccd": Row("trained on bccd", config, ("DATASETS.TRAIN", f"[{train['bccd']}]", *both)),
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


def _figure8_plots() -> list[Plot]:
    """Accuracies over the training, as the figure has them, and the remedies."""
    steps = range(150, 1501, 150)
    shown = ("recomputed", "minibatch", "minibatch as in training")
    plots = [
        Plot(title, "step", "accuracy, %", {name: [(k, row, f"steps/{k}/{name}") for k in steps] for name in shown})
        for row, title in (("16x2", "16 classes x 2"), ("8x4", "8 classes x 4"), ("4x8", "4 classes x 8"))
    ]
    rows = {"8 x 4": "8x4", "GhostBN": "ghost", "shuffled": "shuffle", "all batches": "all", "Batch Renorm": "brn"}
    rows |= {"GroupNorm": "gn", "i.i.d.": "iid"}
    remedies = {label: [(k, row, f"steps/{k}/population") for k in steps] for label, row in rows.items()}
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
    "shift": Study(
        "Domain shift: trained in one laboratory, tested in another",
        "RetinaNet, ResNet-18 with BN in backbone and head, random weights, 800 steps of 4 images of blood cells "
        "(TXL-PBC: the laboratories pbc and bccd), as `configs/coco_folder.yaml`. The paper, Table 4: "
        "statistics of the source fail on a target, those of the target repair some of it.",
        _shift(),
        {
            "pbc, population": "population/pbc/bbox/AP",
            "pbc, minibatch": "minibatch/pbc/bbox/AP",
            "bccd, population": "population/bccd/bbox/AP",
            "bccd, minibatch": "minibatch/bccd/bbox/AP",
            "pbc, recomputed": "recomputed/pbc/bbox/AP",
            "bccd, recomputed": "recomputed/bccd/bbox/AP",
            "bccd, weighed": "population_weighed/bbox/AP",
        },
        {"BLOOD": "the folder of TXL-PBC in COCO format, {train,val}_{pbc,bccd}.json and images/"},
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
        {
            "population": "final/population",
            "recomputed": "final/recomputed",
            "minibatch, i.i.d.": "final/minibatch",
            "minibatch as in training": "final/minibatch as in training",
        },
        plots=_figure8_plots(),
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
