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
        weights_of: the row that trains what this one evaluates; `../STUDY/ROW`: one of another study. A script has
            the file as `--weights`.
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
        curves: label -> its points, each an x, a row and a column of the study.
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
        details: columns of the table only, words or other figures, likewise.
    """

    title: str
    about: str
    rows: Mapping[str, Row]
    columns: Mapping[str, str]
    data: Mapping[str, str] = field(default_factory=dict)
    plots: Sequence[Plot] = ()
    unit: str = "AP"
    details: Mapping[str, str] = field(default_factory=dict)

    def value(self, results: Mapping[str, Any], column: str) -> float | None:
        """The figure of a column in what a run has written; None where it has none."""
        found = self.entry(results, column)
        return found if isinstance(found, (int, float)) else None

    def entry(self, results: Mapping[str, Any], column: str) -> Any:
        """What a run has written for a column, or a detail; None where there is nothing."""
        found: Any = results
        for part in {**self.columns, **self.details}[column].split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

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
        {
            "BLOOD": "the folder of TXL-PBC in COCO format, {train,val}_{pbc,bccd}.json and images/",
            "YOLO_PYTHON": "the Python of an environment with ultralytics, which needs nothing of this library",
        },
        details={"CPU seconds": "cpu_seconds"},
    ),
}
