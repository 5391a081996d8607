"""Studies of detectors: *Rethinking "Batch"*, Tables 3 to 6; what the findings of the audit cost; peers."""

from dataclasses import replace

from study import Row, Study

TABLE_5 = "configs/studies/table5"
TABLE_6 = "configs/studies/table6"


def _table6(data: tuple[str, ...] = ()) -> dict[str, Row]:
    one, two = "population AP", "minibatch AP"

    def row(title: str, config: str, images: int = 4, processes: int = 1, paper: tuple[float, ...] = ()) -> Row:
        """A row with `images` normalized together on each process, four in a step."""
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
    def row(fault: str, title: str, weights: str = "table5/row4", *options: str) -> Row:
        return Row(title, "tools/studies/audit_cost.py", (fault, *options), weights_of=f"../{weights}")

    return {
        "sound": row("as_trained", "none"),
        "never_updated": row("never_updated", "initial statistics: mean 0, variance 1"),
        "frozen_initial": row("frozen_initial", "… in a frozen backbone"),
        "small_momentum": row("small_momentum", "momentum 0.001: the initial statistics weigh a half"),
        "few_updates": row("few_updates", "ten updates: they weigh a third"),
        "nan": row("nan", "NaN in one channel"),
        "zero_variance": row("zero_variance", "variance 0 in one of 16 channels of a layer"),
        "one_layer": row("one_layer", "variances ten times too large in one layer of the head"),
        "row_3": row("as_trained", "population statistics shared by levels (row 3)", "table5/row3", *_SOUND),
        "row_2": row("as_trained", "SGD statistics shared by levels (row 2)", "table5/row2", *_SOUND),
        "other_statistics": row("other_statistics", "statistics of dark images"),
        "other_images": row("other_images", "statistics of light images, tested on dark ones"),
        "raw_pixels": row("raw_pixels", "pixels not normalized as in training"),
        "averaged": row("averaged", "averaged weights with the statistics of the last ones"),
        "padding": row("padding", "statistics of padded images of many sizes"),
        "large_eps": row("large_eps", "eps 0.001 instead of 1e-5"),
        "left_in_training": row("left_in_training", "left in training mode for 40 single images"),
        "last_batch": row("last_batch", "statistics of one batch of 8"),
        "half": row("half", "statistics rounded to float16"),
        "leak": row(
            *("as_trained", "RoIs of one image in the box head", "table6/bn_1_image"),
            *("--leak", "--sound", "table6/bn_4_images", "--repaired", "table6/shuffle"),
        ),
        "few_samples": row(
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
        "of 128 pixels. In the built-in data set `herds` all objects of an image are of the same class, and one object "
        "alone hardly shows which. The paper: if a normalization batch holds the RoIs of one image, the head learns to "
        "read the other RoIs, and fails in inference; shuffling RoIs over the processes, or SyncBN, repairs it.",
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
        "As Table 5 on `shapes`, with real images: 400 steps of 8 images of 160 pixels from one laboratory of TXL-PBC, "
        "pbc, and random weights.",
        _table5_blood(),
        ALL_COLUMNS,
        BLOOD,
    ),
    "table6_cells": Study(
        "Table 6 on cells of four laboratories",
        "As Table 6 on `herds`, with real images: 600 steps of 4 images of 160 pixels, blood cells (TXL-PBC: pbc, "
        "bccd) and nuclei (2018 Data Science Bowl: fluorescence, stain) mixed. The RoIs of an image show which "
        "laboratory it is from, and so which classes it can have. AP is over all classes and images.",
        _table6_cells(),
        {"population AP": "population/overall/bbox/AP", "minibatch AP": "minibatch/overall/bbox/AP"},
        BLOOD | NUCLEI,
    ),
    "shift": Study(
        "Domain shift: trained in one laboratory, tested in another",
        "RetinaNet, ResNet-18 with BN in backbone and head, random weights, 800 steps of 4 images of blood cells "
        "(TXL-PBC: the laboratories pbc and bccd), as `configs/coco_folder.yaml`. The paper, Table 4: "
        "statistics of the source domain fail on the target domain; those of the target recover some of the loss.",
        _shift(),
        {"AP on pbc": "population/pbc/bbox/AP", "AP on bccd": "population/bccd/bbox/AP"},
        BLOOD,
    ),
    "audit": Study(
        "What the findings of the audit cost",
        "Faults planted in a trained detector (row 4 of `table5`, the quickstart), or in the training itself (other"
        " rows of `table5` and `table6`). AP is under population statistics. `dn.audit` looks at 64 images; the "
        "remedy is that of its first finding.",
        _audit(),
        {"before": "before", "after the remedy": "after", "sound model": "sound"},
        details={"named first": "named", "remedy": "remedy"},
    ),
    "peers": Study(
        "What a user would pick instead, in the same CPU time",
        "Blood cells of one laboratory (pbc), tested on its images and on those of another (bccd): random weights, one "
        "thread, 256 pixels, batches of 4. This library: `configs/studies/shift/base.yaml`, 800 steps. torchvision: "
        "ResNet-18, pyramid of 64 channels, no norm in the head, the same optimizer, sizes and steps. ultralytics: "
        "`yolo11n.yaml`, its defaults, 33 epochs. Augmentation is each one's default: three sizes and flips; for YOLO "
        "mosaic, colors, scales, shifts and flips. All are scored by the same COCO evaluation. CPU seconds are of the "
        "training alone.",
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
}
