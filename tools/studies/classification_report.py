"""What the study classification.py writes: its runs as JSON, tables and a figure."""

import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from classification_comments import COMMENTS, OVERVIEW
from classification_runs import SWEEP, Run

SIZES = {"images": 3000, "epochs": 3, "validation": 2000, "test": 5000, "rate": 0.2, "seeds": 3}
EMA, ALPHA, RECOMPUTED = "EMA", "with α", "recomputed"


def save(results: dict[str, Any], file: Path) -> None:
    """A run on each line; the file is replaced as a whole, so an interruption loses one run at most."""
    lines = [f"  {json.dumps(key)}: {json.dumps(run, ensure_ascii=False)}" for key, run in results["runs"].items()]
    text = json.dumps(results | {"runs": {}}, indent=1, ensure_ascii=False)
    text = text.replace('"runs": {}', '"runs": {\n' + ",\n".join(lines) + "\n }")
    new = file.with_suffix(".tmp")
    new.write_text(text + "\n", encoding="utf-8")
    os.replace(new, file)


class Measured:
    """The finished runs, by section and name."""

    def __init__(self, results: dict[str, Any], sections: dict[str, dict[str, Run]]) -> None:
        self.results = results
        self.sections = sections

    def values(self, section: str, name: str, measure: str = EMA) -> list[Any]:
        """The results of each seed that has been run."""
        run = self.sections[section].get(name)
        seeds = range(self.results["seeds"] + 2)
        found = [self.results["runs"].get(run.key(seed), {}) for seed in seeds] if run else []
        return [result[measure] for result in found if measure in result]

    def begun(self, section: str) -> bool:
        """Whether one of its runs is finished; a section without runs shows those of others."""
        runs = self.sections.get(section, {})
        return not runs or any(self.values(section, name, "seconds") for name in runs)

    def mean(self, section: str, name: str, measure: str = EMA) -> float:
        return statistics.mean(self.values(section, name, measure))

    def cell(self, section: str, name: str, measure: str = EMA) -> str:
        return spread(self.values(section, name, measure))

    def sweep(self, name: str, index: int) -> list[str]:
        """The test accuracy (index 0) or cross-entropy (1) for each α."""
        of_seeds = self.values("α", name, "sweep")
        of_weights = [[sweep[k][index] for sweep in of_seeds] for k in range(len(SWEEP))]
        return [spread(values, digits=2 if index == 0 else 3) for values in of_weights]


def spread(values: list[float], digits: int = 2, sign: str = "") -> str:
    """Mean ± standard deviation; "-" where nothing was run or measured."""
    if not values:
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.{digits}f} ± {deviation:.{digits}f}"


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> list[str]:
    head = list(head)
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:], ""]


def report(results: dict[str, Any], sections: dict[str, dict[str, Run]], folder: Path) -> None:
    """classification.md and classification.png."""
    study = Measured(results, sections)
    sizes = results["settings"]
    committed = sizes == {"data": "Fashion-MNIST"} | {k: v for k, v in SIZES.items() if k != "seeds"}
    lines = [
        *("# Norms of a small classifier", "", f"`{results['command']}`  ", f"{results['machine']}.", ""),
        f"{sizes['data']} at half resolution, {sizes['images']} training images, {sizes['test']} for test accuracy,",
        f"{sizes['validation']} others of the training set to choose α and the learning rate. A CNN with two residual",
        "blocks, 16 and 64 channels, six convolutions; SGD with momentum 0.9 and weight decay 5e-4 on all parameters.",
        "The learning rate is proportional to the batch size; it rises over 5 % of the steps and falls linearly to 0.",
        f"Seeds 0 to {results['seeds'] - 1} are of weights and order; the images are the same. Cells: test accuracy",
        "in %, mean ± standard deviation over the seeds, under the EMA of training unless said otherwise.",
        "*α*: example weighing with the α of best validation accuracy. *Recomputed*: population statistics by",
        "`dn.recompute_population_statistics` from the training images, in i.i.d. batches of 130.",
        *("", "![accuracies](classification.png)", ""),
    ]
    if committed:
        lines += [OVERVIEW.strip(), ""]
    parts = {
        "rate": ("Learning rate", _rate),
        "batch size": ("Batch size (Batch Group Normalization, Table 2)", _batch_size),
        "all four": ("All four (Four Things, Fig. 5)", _all_four),
        "ghost size": ("Ghost size (Four Things, Figs. 3 and 4)", _ghost_size),
        "SeqNorm": ("SeqNorm (Ghost Normalization, Tables 1 and 2)", _seq_norm),
        "α": ("Example weight α (Four Things, Figs. 1 and 2)", _alpha),
        "decay": ("Decay of γ and β (Four Things, §3.3)", _decay),
        "few classes": ("Minibatches of few classes (Four Things, Table 1)", _few_classes),
        "renorm": ("Over training (Batch Renormalization, Figs. 1 to 3)", _renorm),
    }
    for key, (title, part) in parts.items():
        if not study.begun(key):
            continue
        lines += [f"## {title}", "", *part(study)]
        if committed and key in COMMENTS:
            lines += [COMMENTS[key].strip(), ""]
    (folder / "classification.md").write_text("\n".join(lines), encoding="utf-8")
    _figure(study, folder / "classification.png")


def _passes(study: Measured, times: int = 1, part: int = 1) -> str:
    sizes = study.results["settings"]
    epochs = sizes["epochs"] * times
    return f"{epochs} epoch{'s' * (epochs > 1)} of {sizes['images'] // part} images"


def _rate(study: Measured) -> list[str]:
    rates = study.sections["rate"]
    chosen = study.results["settings"]["rate"]
    text = (
        f"BN, batch 128, {_passes(study)}: validation accuracy by learning rate. All "
        f"others use {chosen:g} · batch / 128."
    )
    return [text, "", *table(rates, [[study.cell("rate", name, "validation") for name in rates]])]


def _batch_size(study: Measured) -> list[str]:
    names = {name: [f"{name}/{size}" for size in _sizes(study)] for name in _norms(study)}
    head = ["batch size", *_sizes(study)]
    lines = [
        f"{_passes(study)}. GN has 8 groups; GBGN 8 channel groups of 2 examples; GhostBN groups of "
        f"16, of 4 at batch 8,",
        "of 2 at 4 and 2 (where it is BN); SeqNorm 8 channel groups, then the groups of GhostBN; BGN the paper's G,",
        "512, 128, 16, 2, 1, or the nearest number that divides a layer's features. BRN has the paper's schedule of",
        "limits in shares of the steps, and momentum 0.1 · batch / 32, from 0.01 to 0.1.",
        "",
    ]
    for title, measure in (("EMA", EMA), ("Recomputed", RECOMPUTED), ("α", ALPHA)):
        rows = [[name, *(study.cell("batch size", run, measure) for run in runs)] for name, runs in names.items()]
        lines += [f"{title}:", "", *table(head, [row for row in rows if {*row[1:]} != {"-"}])]
    chosen = [[name, *(_weights(study, "batch size", run) for run in runs)] for name, runs in names.items()]
    return [*lines, "The α chosen for each seed:", "", *table(head, [row for row in chosen if {*row[1:]} != {"-"}])]


def _weights(study: Measured, section: str, name: str) -> str:
    return ", ".join(f"{weight:g}" for weight in study.values(section, name, "α")) or "-"


def _sizes(study: Measured) -> list[int]:
    return sorted({int(name.split("/")[1]) for name in study.sections["batch size"]}, reverse=True)


def _norms(study: Measured) -> list[str]:
    return list(dict.fromkeys(name.split("/")[0] for name in study.sections["batch size"]))


def _ghost_size(study: Measured) -> list[str]:
    rows = []
    for size in study.sections["ghost size"]:
        cells = [study.cell("ghost size", size, measure) for measure in (EMA, ALPHA, RECOMPUTED)]
        rows.append([size, *cells, _weights(study, "ghost size", size)])
    head = ("group size", "EMA, α = 0", "α chosen", "recomputed, α = 0", "the α of each seed")
    return [f"GhostBN, batch 128 (at 128 it is BN), {_passes(study, times=3)}.", "", *table(head, rows)]


def _all_four(study: Measured) -> list[str]:
    """Rows from the runs by batch size; γ and β decay in all of them."""
    sizes = _sizes(study)
    alone = {name: [(name, EMA)] * len(sizes) for name in ("BN", "GN", "GhostBN")}
    together = [("GBGN" if size == 2 else "GhostBN", ALPHA) for size in sizes]
    rows = []
    for name, columns in (alone | {"GhostBN and α; at 2 GBGN and α": together}).items():
        cells = zip(sizes, columns, strict=True)
        rows.append([name, *(study.cell("batch size", f"{norm}/{size}", measure) for size, (norm, measure) in cells)])
    text = f"{_passes(study)}; cells of the tables above: γ and β decay as the weights everywhere."
    return [text, "", *table(("batch size", *sizes), rows)]


def _seq_norm(study: Measured) -> list[str]:
    measures = ("validation", EMA)
    rows = [
        [name, *(study.cell("SeqNorm", name, measure) for measure in measures)] for name in study.sections["SeqNorm"]
    ]
    text = f"Batch 128, {_passes(study, times=3)}; *groups* are of samples, of which SeqNorm has the paper's eight."
    return [text, "", *table(("norm", "validation accuracy", "test accuracy"), rows)]


def curve(study: Measured, name: str, measure: str) -> list[list[float]]:
    """The values of all seeds at each point; none where it was not measured."""
    curves = study.values("renorm", name, "curve")
    points = zip(*curves, strict=True)
    return [[point[measure] for point in seeds] for seeds in points if all(measure in point for point in seeds)]


CURVES = {  # label -> its runs, what is measured
    "BN": ("BN", EMA),
    "BRN": ("BRN", EMA),
    "BN, groups of 4": ("BN, groups of 4", EMA),
    "BRN, groups of 4": ("BRN, groups of 4", EMA),
    "2 classes: BN": ("BN, 2 classes", EMA),
    "2 classes: BN, training minibatches": ("BN, 2 classes", "training"),
    "2 classes: BN, test minibatches of 2 classes, their statistics": ("BN, 2 classes", "equal minibatches"),
    "2 classes: GhostBN, each class once": ("GhostBN, 2 classes, each once", EMA),
    "2 classes: BRN": ("BRN, 2 classes", EMA),
}


def _renorm(study: Measured) -> list[str]:
    points = {label: curve(study, *which) for label, which in CURVES.items()}
    thirds = [len(points["BN"]) * k // 3 - 1 for k in (1, 2, 3)]
    rows = [[label, *(spread(values[k]) for k in thirds)] for label, values in points.items() if values]
    text = [
        f"Minibatches of 32 images, {_passes(study, times=3)}; momentum 0.1. *Groups of 4*: each "
        f"minibatch is normalized",
        "in eight parts. *2 classes*: 16 images of each of two classes. Accuracy after a third of the training, two",
        "thirds, and all of it:",
        "",
    ]
    return [*text, *table(("", "1/3", "2/3", "end"), rows)]


def _alpha(study: Measured) -> list[str]:
    head = ["α", *(f"{weight:g}" for weight in SWEEP)]
    lines = [
        f"Batch 128: {_passes(study, times=3)}, batch 8: {_passes(study)}. GN is weighed against "
        f"recomputed statistics.",
        "",
    ]
    for title, index in (("Test accuracy", 0), ("Cross-entropy", 1)):
        lines += [
            f"{title}:",
            "",
            *table(head, [[name, *study.sweep(name, index)] for name in study.sections["α"]]),
        ]
    return lines


def _decay(study: Measured) -> list[str]:
    without = study.values("decay", "none")
    rows = []
    for name in study.sections["decay"]:
        values = study.values("decay", name)
        against = spread([a - b for a, b in zip(values, without, strict=True)], sign="+")
        rows.append([name, spread(values), "" if name == "none" else against])
    text = f"BN, batch 32, {_passes(study, times=5, part=3)}, {len(without)} seeds; the other weights decay by 5e-4."
    return [text, "", *table(("decay of γ and β", "test accuracy", "minus that of none, same seed"), rows)]


def few_rows(study: Measured) -> dict[str, tuple[str, str]]:
    """Label of a row -> name of its runs, what is measured."""
    names = dict.fromkeys(name.split("/")[0] for name in study.sections["few classes"])
    rows: dict[str, tuple[str, str]] = {}
    for name in names:
        rows[name] = (name, EMA)
        if name in ("BN", "GBGN", "BRN, momentum 0.1") or name.startswith("GhostBN"):
            rows[f"{name}, α"] = (name, ALPHA)
        if name in ("BN", "GhostBN, each class once"):
            rows[f"{name}, recomputed"] = (name, RECOMPUTED)
        if name == "BN":
            rows["BN, minibatch statistics, equally composed"] = (name, "equal minibatches")
            rows["BN, minibatch statistics, random minibatches"] = (name, "random minibatches")
    return rows


def _few_classes(study: Measured) -> list[str]:
    kinds = list(dict.fromkeys(name.split("/")[1] for name in study.sections["few classes"]))
    rows = [
        [label, *(study.cell("few classes", f"{name}/{kind}", measure) for kind in kinds)]
        for label, (name, measure) in few_rows(study).items()
    ]
    text = [
        f"Training minibatches of 32 images, {_passes(study, times=3)}; tests are of the usual images. In disjoint",
        "halves, each half of a minibatch has classes of its own, half of all. GhostBN has groups of as many images as",
        "the minibatch has classes (halves: 16, one half): in any order, or such that each group has each class once.",
        "BGN has G = 4; SeqNorm 8 channel groups and 2 groups of examples; the others are as above.",
        "",
    ]
    return [*text, *table(("trained on", *kinds), rows)]


def _figure(study: Measured, file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, ((left, right), (low, last), (iid, few)) = plt.subplots(3, 2, figsize=(10, 12))
    for name in _norms(study):
        points = [(size, study.values("batch size", f"{name}/{size}")) for size in _sizes(study)]
        _errors(left, [(size, values) for size, values in points if values], name)
    left.set(xscale="log", xlabel="batch size", xticks=_sizes(study), xticklabels=_sizes(study))
    for label, measure in (("α = 0", EMA), ("α chosen", ALPHA), ("recomputed", RECOMPUTED)):
        sizes = study.sections["ghost size"]
        _errors(right, [(int(size), study.values("ghost size", size, measure)) for size in sizes], label)
    right.set(xscale="log", xlabel="ghost size at batch 128", xticks=[*map(int, sizes)], xticklabels=[*sizes])
    for name in study.sections["α"]:
        sweeps = study.values("α", name, "sweep")
        _errors(low, [(weight, [s[k][0] for s in sweeps]) for k, weight in enumerate(SWEEP)], name)
    low.set(xlabel="α", ylim=(max(low.get_ylim()[0], 60), None))
    rows = {
        label: study.values("few classes", f"{name}/2 classes × 16", m) for label, (name, m) in few_rows(study).items()
    }
    rows = {"BN, i.i.d. minibatches": study.values("few classes", "BN/i.i.d.")} | rows
    shown = [(label.replace("minibatch statistics, ", ""), values) for label, values in rows.items() if values][::-1]
    means = [statistics.mean(values) for _, values in shown]
    deviations = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in shown]
    last.barh([label for label, _ in shown], means, xerr=deviations, color="lightsteelblue")
    last.set(xlim=(max(min(means) - 5, 0), None), xlabel="test accuracy, %, trained on 2 classes × 16")
    last.tick_params(axis="y", labelsize=7)
    for label, which in CURVES.items() if study.begun("renorm") else ():
        axis = few if label.startswith("2 classes") else iid
        _errors(axis, list(enumerate(curve(study, *which), 1)), label.removeprefix("2 classes: "))
    iid.set(xlabel="epoch", title="minibatches of 32")
    few.set(xlabel="epoch", title="minibatches of 2 classes")
    for axis in (iid, few):
        axis.set_visible(bool(axis.containers))
    for axis in (axis for axis in (left, right, low, iid, few) if axis.containers):
        axis.set(ylabel="test accuracy, %")
        axis.legend(fontsize=7)
        axis.minorticks_off()
    figure.tight_layout()
    figure.savefig(file, dpi=100, metadata={"Software": None})


def _errors(axis: Any, points: list[tuple[float, list[float]]], label: str) -> None:
    """Means with standard deviations."""
    deviations = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points]
    means = [statistics.mean(values) for _, values in points]
    axis.errorbar([x for x, _ in points], means, deviations, marker="o", markersize=3, capsize=2, label=label)
