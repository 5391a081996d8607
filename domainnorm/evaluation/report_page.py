"""The page of a run's report: findings, tables, curves and the worst images. Needs matplotlib."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..config import changed_options
from ..data import ClassificationDataset, CocoDataset, by_name, test_loader
from ..output import output_folder, replace_file, write_json
from ..visualization import plots
from ..visualization.page import Page
from ..visualization.pairs import fit
from .findings import confused, find_confused, find_in_mistakes, find_in_training, find_results
from .mistakes import Mistakes, find_mistakes
from .pictures import class_name, draw_detections, read_unchanged
from .run_files import KINDS, Run, read_predictions
from .tables import by_class, file_name, number, overall

WORST = 12  # images that are drawn
PAIRS = 10  # of classes that are confused most


def report_page(run: Run) -> str:
    """The page, and as files in the folder of the run: its figures, and the best thresholds."""
    sections, findings = Page(), []
    for name, entry in by_name(run.cfg.DATASETS.TEST).items():
        sections.heading(f"Results on {name}")
        section = _DataSet(run, name, entry, sections)
        section.write()
        findings += section.findings
    if any("overall" in sets for sets in run.results.values()):
        sections.heading("Results on all data sets together")
        _statistics(sections, run, "overall")
    _training(sections, run)
    findings += find_in_training(run)
    sections.heading("Options that are not at their defaults")
    options = [[key, str(value)] for key, value in changed_options(run.cfg).items()]
    sections.table(["option", "value"], options, words=2)
    page, model = Page(f"Report of {run.folder.resolve().name}"), run.cfg.MODEL
    page.text(f"{model.META_ARCHITECTURE} with {model.BACKBONE.NAME}, {run.cfg.SOLVER.MAX_ITER} iterations")
    page.heading("Findings")
    page.items(findings)
    page.append(sections)
    return str(page)


class _DataSet:
    """The section of one data set.

    Attributes:
        findings: of what was written.
    """

    def __init__(self, run: Run, name: str, entry: str, page: Page) -> None:
        self.run, self.name, self.entry, self.page = run, name, entry, page
        several = len(run.cfg.DATASETS.TEST) > 1
        self.where = f" on {name}" if several else ""
        self.prefix = f"{file_name(name)}_" if several else ""  # of the names of figures
        self.statistics = next((key for key, sets in run.results.items() if name in sets), "")
        self.predictions = run.folder / "inference" / self.statistics / (file_name(name) if several else "")
        self.findings: list[str] = []

    def write(self) -> None:
        """All that there is to say."""
        for kind, results in _statistics(self.page, self.run, self.name).items():
            self.findings += find_results(results, _of(kind) + self.where)
        predictions = read_predictions(self.predictions)
        if predictions is None:
            return
        dataset = test_loader(self.run.cfg, self.entry, rank=0, world_size=1).dataset
        self.page.text(f"All that follows is of {len(dataset)} images under {self.statistics} statistics.")
        if isinstance(dataset, ClassificationDataset):
            self._classifier(dataset, predictions)
        else:
            self._detector(dataset, predictions)

    def _classes(self, kind: str, names: Sequence[str], others: dict[str, list[str]]) -> None:
        """A table of all classes: columns of `others`, then the scores under each statistics."""
        found = {key: by_class(sets[self.name][kind]) for key, sets in self.run.results.items() if self.name in sets}
        metrics = list(next(iter(next(iter(found.values())).values())))
        head = [f"{metric} {key}" if len(found) > 1 else metric for key in found for metric in metrics]
        rows = [
            [name, *cells, *(number(classes[name][metric]) for classes in found.values() for metric in metrics)]
            for name, *cells in zip(names, *others.values(), strict=True)
        ]
        self.page.heading(f"Classes{_of(kind)}", 3)
        self.page.table(["class", *others, *head], rows)

    def _detector(self, dataset: CocoDataset, predictions: list[dict[str, Any]]) -> None:
        truth, thresholds, boxes = dataset.ground_truth(), {}, None
        for kind in ("bbox", "segm")[: 1 + self.run.cfg.MODEL.MASK_ON]:
            mistakes = find_mistakes(predictions, truth, kind)
            boxes = boxes or mistakes
            self.findings += find_in_mistakes(mistakes, _of(kind) + self.where)
            self._classes(kind, mistakes.class_names, _at_best(mistakes))
            self.page.text(
                "Precision, recall and F1 at an IoU of 0.5, of the predictions of a class that score its best score or "
                "more: the one where its F1 is largest."
            )
            self._curves(kind, mistakes)
            classes = zip(mistakes.class_names, mistakes.curves, strict=True)
            thresholds[kind] = {
                "all": _finite(mistakes.overall.threshold),
                "classes": {name: _finite(curve.threshold) for name, curve in classes},
            }
        write_json(self.predictions / "thresholds.json", thresholds)
        assert boxes is not None
        names = boxes.class_names
        title = f"Confusion matrix of the boxes that score {boxes.threshold:.3f} or more, at an IoU of 0.5"
        self._confusion(boxes.confusion, [*names, "nothing"], [*names, "missed"], title)
        self._worst_detections(dataset, predictions, boxes)

    def _curves(self, kind: str, mistakes: Mistakes) -> None:
        prefix = self.prefix + ("masks_" if kind == "segm" else "")
        classes = zip(mistakes.class_names, mistakes.curves, strict=True)
        there = {name: curve for name, curve in classes if curve.objects}
        if there:
            figure = plots.precision_by_recall({name: curve.interpolated() for name, curve in there.items()})
            _figure(self.page, self.run, f"{prefix}precision_recall", figure, f"Precision by recall{_of(kind)}")
        curve = mistakes.overall
        points = {name: (own.scores, own.f1) for name, own in there.items()}
        highest = None if curve.best is None else (curve.threshold, float(curve.f1[curve.best]))
        figure = plots.f1_by_score(points | {"over all": (curve.scores, curve.f1)}, highest)
        _figure(self.page, self.run, f"{prefix}f1", figure, f"F1 by score{_of(kind)}")

    def _worst_detections(self, dataset: CocoDataset, predictions: list[dict[str, Any]], mistakes: Mistakes) -> None:
        self.page.heading("The images with the most mistakes", 3)
        self.page.text(
            "Objects that were missed, and boxes that are not right, of those that score "
            f"{mistakes.threshold:.3f} or more, at an IoU of 0.5; an object found as another class is both. Left: the "
            "objects. Right: the predictions."
        )
        kept: dict[int, list[dict[str, Any]]] = {id_: [] for id_ in mistakes.worst(WORST)}
        for entry in predictions:
            if entry["image_id"] in kept and entry["score"] >= mistakes.threshold:
                kept[entry["image_id"]].append(entry)
        places = {id_: index for index, id_ in enumerate(dataset.image_ids)}
        for id_, found in kept.items():
            missed, wrong = mistakes.missed.get(id_, 0), mistakes.wrong.get(id_, 0)
            caption = f"{dataset.records[places[id_]].file_name}: {missed} missed, {wrong} wrong"
            self.page.picture(draw_detections(dataset, places[id_], found), caption)

    def _classifier(self, dataset: ClassificationDataset, predictions: list[dict[str, Any]]) -> None:
        number_of_classes = 1 + max(max(entry["label"], entry["predicted"][0]) for entry in predictions)
        names = [class_name(dataset.class_names, k) for k in range(max(len(dataset.class_names), number_of_classes))]
        confusion = np.zeros((len(names), len(names)), dtype=np.int64)
        for entry in predictions:
            confusion[entry["label"], entry["predicted"][0]] += 1
        self.findings += find_confused(confusion, names, self.where)
        images = [str(count) for count in confusion.sum(1)[: len(dataset.class_names)]]
        self._classes("classification", dataset.class_names, {"images": images})
        self._confusion(confusion, names, names, "Confusion matrix")
        self.page.heading("The images with the highest loss", 3)
        pictures: dict[int, tuple[Any, str]] = {}  # by image: under minibatch statistics one may come twice
        for entry in sorted(predictions, key=lambda entry: (-entry["loss"], entry["image_id"])):
            if entry["image_id"] not in pictures and len(pictures) < WORST:
                image, file = read_unchanged(dataset, entry["image_id"])
                true, predicted = names[entry["label"]], names[entry["predicted"][0]]
                caption = f"{true}, predicted {predicted}; loss {entry['loss']:.2f}; {file}"
                pictures[entry["image_id"]] = fit(image), caption
        self.page.pictures(list(pictures.values()))

    def _confusion(self, confusion: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str) -> None:
        figure = plots.confusion_matrix(confusion, rows, columns)
        _figure(self.page, self.run, f"{self.prefix}confusion", figure, title)
        number_of_classes = sum(row == column for row, column in zip(rows, columns, strict=True))
        pairs = confused(confusion[:number_of_classes, :number_of_classes], rows)[:PAIRS]
        if len(rows) > plots.MAX_CELLS and pairs:
            self.page.table(["taken for another class", "times"], [[f"{a} → {b}", str(n)] for a, b, n in pairs])


def _statistics(page: Page, run: Run, data_set: str) -> dict[str, dict[str, dict[str, float | None]]]:
    """Tables of all statistics side by side; for each kind the metrics of each statistics."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for statistics, sets in run.results.items():
        for kind, values in sets.get(data_set, {}).items():
            found.setdefault(kind, {})[statistics] = values
    for kind, results in found.items():
        head = list(overall(next(iter(results.values()))))
        page.table([KINDS[kind], *head], [[key, *map(number, overall(row).values())] for key, row in results.items()])
    return found


def _training(page: Page, run: Run) -> None:
    if not run.series("total_loss")[0]:
        return
    losses = dict.fromkeys(key for line in run.metrics for key in line if key.startswith("loss_"))
    panels: dict[str, plots.Series] = {
        "loss": {key: run.series(key) for key in ("total_loss", *losses)},
        "learning rate": {"lr": run.series("lr")},
    }
    for metric in ("AP", "top1"):
        if names := run.evaluated(metric):
            panels[metric] = {name.removesuffix(f"/{metric}"): run.series(name) for name in names}
    page.heading("Training")
    _figure(page, run, "training", plots.lines(panels, "iteration"), "What metrics.json has")


def _figure(page: Page, run: Run, name: str, figure: Figure, caption: str) -> None:
    """On the page, and as a file."""
    content = plots.png(figure)
    with replace_file(output_folder(run.folder / "report") / f"{name}.png", "wb") as stream:
        stream.write(content)
    page.picture(content, caption)


def _at_best(mistakes: Mistakes) -> dict[str, list[str]]:
    """Columns of a table of classes."""
    curves = mistakes.curves
    columns = {
        "objects": [str(curve.objects) for curve in curves],
        "best score": ["-" if curve.best is None else f"{curve.threshold:.3f}" for curve in curves],
    }
    for metric in ("precision", "recall", "f1"):
        columns[metric.title() if metric == "f1" else metric] = [
            "-" if curve.best is None else f"{getattr(curve, metric)[curve.best]:.3f}" for curve in curves
        ]
    return columns


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _of(kind: str) -> str:
    return " of masks" if kind == "segm" else ""
