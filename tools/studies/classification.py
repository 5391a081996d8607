#!/usr/bin/env python
"""What the papers on small, ghost and odd minibatches claim, on a small residual CNN and real images.

    tools/studies/classification.py [--data FOLDER] [--out docs/studies] [--images 3000] [--epochs 3] [--seeds 3]

The data is Fashion-MNIST at half resolution, from the folder of Debian's package dataset-fashion-mnist;
`--data patches` uses the built-in data set. Sections: batch size, ghost size, SeqNorm, example weight α, decay of γ and
β, minibatches of few classes, Batch Renorm over training. Writes classification.json, classification.md and
classification.png. Each finished run is saved in classification.json immediately: the same command continues with those
that are missing.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import classification_report
import torch
from classification_runs import DEBIAN, Run, follow, measure, read_data, train

BATCHES = (128, 32, 8, 4, 2)
GHOST_SIZES = (128, 64, 32, 16, 8, 4, 2)
RATES = (0.1, 0.2, 0.4, 0.8)
PAPERS_G = {128: 512, 32: 128, 8: 16, 4: 2, 2: 1}  # of BGN, by batch size
PATTERNS = {  # of minibatches of 32 images: how they are made, of how many classes
    "i.i.d.": ("iid", 0),
    "4 classes × 8": ("few_classes", 4),
    "2 classes × 16": ("few_classes", 2),
    "disjoint halves": ("class_disjoint_halves", 0),
}
GN = {"num_groups": 8}
GBGN = {"num_channel_groups": 8, "samples_per_group": 2}


def sections() -> dict[str, dict[str, Run]]:
    """The runs of each section by name; runs of equal fields are trained once."""
    few = {f"{name}/{kind}": run for kind, pattern in PATTERNS.items() for name, run in remedies(*pattern).items()}
    swept = {
        "BN, batch 128": Run("BN", 128, times=3),
        "BN, batch 8": Run("BN", 8),
        "GhostBN of 8, batch 128": ghost(128, 8, times=3),
        "GN, batch 128": Run("GN", 128, GN, times=3),
        "GBGN, batch 8": Run("GBGN", 8, GBGN),
    }
    decay = partial(Run, "BN", 32, part=3, times=5)
    decays = {
        "none": decay(decay=(0.0, 0.0)),
        "5e-4 to 0, as the weights": decay(decay=(5e-4, 0.0)),
        "5e-4, γ to 1": decay(decay=(5e-4, 1.0)),
        "1e-2 to 0": decay(decay=(1e-2, 0.0)),
        "1e-2, γ to 1": decay(decay=(1e-2, 1.0)),
    }
    return {
        "rate": {str(rate): Run("BN", 128, rate=rate) for rate in RATES},
        "few classes": few,
        "ghost size": {str(size): ghost(128, size, times=3) for size in GHOST_SIZES},
        "α": swept,
        "decay": decays,
        "batch size": {f"{name}/{size}": run for size in BATCHES for name, run in norms(size).items()},
        "SeqNorm": seq_norms(),
        "renorm": curves(),
    }


def seq_norms() -> dict[str, Run]:
    """GhostBN by the number of its groups, then SeqNorm of 8 groups of samples by the number of channel groups."""
    runs = {"BN": Run("BN", 128, times=3)}
    runs |= {f"GhostBN, {128 // size} groups": ghost(128, size, times=3) for size in (64, 32, 16, 8)}
    for number in (1, 2, 4, 8, 16):
        options = {"num_channel_groups": number, "num_sample_groups": 8}
        runs[f"SeqNorm, {number} groups of channels"] = Run("SeqNorm", 128, options, times=3)
    return runs


def curves() -> dict[str, Run]:
    """Batch Renorm's figures: minibatches of 32, groups of 4 of them, few classes."""
    train = partial(Run, batch=32, times=3, curve=True)
    brn, few = {"momentum": 0.1}, ("few_classes", 2)
    return {
        "BN": train("BN"),
        "BRN": train("BRN", options=brn),
        "BN, groups of 4": train("GhostBN", options={"samples_per_group": 4}),
        "BRN, groups of 4": train("BRN", options=brn | {"samples_per_group": 4}),
        "BN, 2 classes": train("BN", pattern=few),
        "GhostBN, 2 classes, each once": train(
            "GhostBN", options={"samples_per_group": 2}, pattern=("few_classes_in_rounds", 2)
        ),
        "BRN, 2 classes": train("BRN", options=brn, pattern=few),
    }


def ghost(batch: int, size: int, **others: Any) -> Run:
    """With one group it is BN."""
    return Run("BN", batch, **others) if size >= batch else Run("GhostBN", batch, {"samples_per_group": size}, **others)


def norms(batch: int) -> dict[str, Run]:
    """Each norm at a batch size."""
    size = max(min(16, batch // 2), 2)
    return {
        "BN": Run("BN", batch),
        "GN": Run("GN", batch, GN),
        "BGN": Run("BGN", batch, {"num_groups": PAPERS_G[batch]}),
        "GBGN": Run("GBGN", batch, GBGN),
        "GhostBN": ghost(batch, size),
        "SeqNorm": Run("SeqNorm", batch, {"num_channel_groups": 8, "num_sample_groups": batch // size}),
        "BRN": Run("BRN", batch, {"momentum": min(max(0.1 * batch / 32, 0.01), 0.1)}),
    }


def remedies(kind: str, classes: int) -> dict[str, Run]:
    """For minibatches of 32 images; all remedies where classes are fewest, as is the leak of labels largest there."""
    train = partial(Run, batch=32, pattern=(kind, classes), times=3)
    runs = {"BN": train("BN")}
    if kind == "class_disjoint_halves":
        return runs | {"GhostBN, any order": train("GhostBN", options={"samples_per_group": 16})}
    runs |= {"GN": train("GN", options=GN), "GBGN": train("GBGN", options=GBGN)}
    runs["BRN, momentum 0.1"] = train("BRN", options={"momentum": 0.1})
    if kind == "iid":
        return runs
    size = {"samples_per_group": classes}
    runs["GhostBN, any order"] = train("GhostBN", options=size)
    runs["GhostBN, each class once"] = train("GhostBN", options=size, pattern=(f"{kind}_in_rounds", classes))
    if classes == 2:
        for larger in (4, 8, 16):
            runs[f"GhostBN of {larger}, any order"] = train("GhostBN", options={"samples_per_group": larger})
        runs["BRN, momentum 0.02"] = train("BRN", options={"momentum": 0.02})
        runs["BN, frozen from half-way on"] = train("BN", freeze=True)
        runs["BGN"] = train("BGN", options={"num_groups": 4})
        runs["SeqNorm"] = train("SeqNorm", options={"num_channel_groups": 8, "num_sample_groups": 2})
    return runs


def ordered(runs: dict[str, dict[str, Run]], seeds: int) -> Iterator[tuple[int, Run]]:
    """All of one seed before the next. The effect of decay is small: two more seeds."""
    for seed in range(seeds + 2):
        for section, own in runs.items():
            if seed < {"decay": seeds + 2}.get(section, seeds):
                yield from ((seed, run) for run in own.values())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Norms in a small classifier, by batch size and kind of minibatch.")
    parser.add_argument("--data", default=DEBIAN, help="folder of Fashion-MNIST, or 'patches'")
    parser.add_argument("--out", type=Path, default=Path("docs/studies"))
    defaults = classification_report.SIZES
    for name, text in (
        ("images", "to train on"),
        ("epochs", "of each run; three times as many, or five, where overfitting is looked for"),
        ("validation", "images to choose α and the learning rate"),
        ("test", "images of the reported accuracy"),
        ("rate", "learning rate for a batch of 128"),
    ):
        parser.add_argument(f"--{name}", type=type(defaults[name]), default=defaults[name], help=text)
    parser.add_argument("--sections", nargs="+", metavar="SECTION", help="sections to train; all by default")
    parser.add_argument("--seeds", type=int, default=defaults["seeds"])
    args = parser.parse_args(argv)
    options = {name: getattr(args, name) for name in defaults}
    if args.images < GHOST_SIZES[1]:
        parser.error(f"--images takes {GHOST_SIZES[1]} or more, the largest group of samples, got {args.images}")
    patches = args.data == "patches"
    settings = {"data": "patches" if patches else "Fashion-MNIST"} | {k: v for k, v in options.items() if k != "seeds"}
    file = args.out / "classification.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"settings": settings, "runs": {}}
    if results["settings"] != settings:
        parser.error(f"{file} has runs of other sizes, {results['settings']}: choose another --out, or remove it")
    given = ["--data patches"] * patches + [f"--{k} {v}" for k, v in options.items() if v != defaults[k]]
    results["command"] = " ".join(["tools/studies/classification.py", *given])
    results["machine"] = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    results["seeds"] = args.seeds
    data = read_data(args.data, args.validation, args.test)
    runs = sections()
    args.out.mkdir(parents=True, exist_ok=True)
    if unknown := [section for section in args.sections or () if section not in runs]:
        parser.error(f"--sections takes any of {list(runs)}, got {unknown[0]!r}")
    chosen = {section: runs[section] for section in args.sections or runs}
    for seed, run in ordered(chosen, args.seeds):
        key, sweep = run.key(seed), run in runs["α"].values()
        if key in results["runs"]:
            continue
        began = time.monotonic()
        trained = tuple(part[: args.images // run.part] for part in data["train"])
        curve: list[dict[str, float]] = []
        watch = partial(follow, curve, run, data["test"]) if run.curve else None
        model = train(run, trained, args.epochs, args.rate, seed, watch)
        result = {"curve": curve} if run.curve else measure(run, model, data, trained, sweep)
        results["runs"][key] = result | {"seconds": round(time.monotonic() - began, 1)}
        classification_report.save(results, file)
        print(key, results["runs"][key], flush=True)
    classification_report.report(results, runs, args.out)
    print((args.out / "classification.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
