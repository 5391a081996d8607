"""What a run's results say, in sentences: the first lines of its report."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .mistakes import Mistakes
from .run_files import Run
from .tables import by_class

FAR = 1.0  # points of AP or accuracy, from which on a difference is told
_FEW = 3

Values = dict[str, float | None]


def main_metric(values: Values) -> str:
    """AP, or top1."""
    return "AP" if "AP" in values else "top1"


def find_results(results: dict[str, Values], where: str) -> list[str]:
    """How good the model is under the first of several statistics, and how the others differ.

    Args:
        results: of each statistics the metrics, of one data set and kind.
        where: is said of all, such as " on val".
    """
    (first, values), *others = results.items()
    metric = main_metric(values)
    if values[metric] is None:
        return [f"There is nothing to find{where}."]
    detail = f" (AP50 {_text(values['AP50'])}, AP75 {_text(values['AP75'])})" if metric == "AP" else ""
    found = [f"{metric} is {_text(values[metric])}{detail} under {first} statistics{where}."]
    for name, other in others:
        gain = _minus(other[metric], values[metric])
        if gain is not None and abs(gain) >= FAR:
            found.append(
                f"Under {name} statistics {metric} is {abs(gain):.1f} points {'higher' if gain > 0 else 'lower'}: "
                f"{_text(other[metric])}{where}.{_advice(first, name, gain)}"
            )
    classes = [(name, own[metric]) for name, own in by_class(values).items() if own[metric] is not None]
    if len(classes) > 1:
        classes.sort(key=lambda item: item[1])
        lowest = ", ".join(f"{name} {value:.1f}" for name, value in classes[:-1][:_FEW])
        name, value = classes[-1]
        found.append(f"The lowest {metric} of a class: {lowest}; the highest: {name} {value:.1f}{where}.")
    return found


def find_in_mistakes(mistakes: Mistakes, where: str) -> list[str]:
    """The best threshold, what it gives, and what is confused most."""
    curve, best = mistakes.overall, mistakes.overall.best
    if best is None:
        return [f"No prediction is right at an IoU of 0.5{where}."]
    found = [
        f"Keep predictions that score {curve.threshold:.2f} or more: then {100 * curve.precision[best]:.0f}% of them "
        f"are right, {100 * curve.recall[best]:.0f}% of {curve.objects} objects are found, F1 is "
        f"{curve.f1[best]:.3f}{where}."
    ]
    found += find_confused(mistakes.confusion[:-1, :-1], mistakes.class_names, where)
    missed, invented = int(mistakes.confusion[:-1, -1].sum()), int(mistakes.confusion[-1, :-1].sum())
    found.append(
        f"At that score, objects that are missed{where}: {missed}; predictions of nothing, or of an object that is "
        f"found already: {invented}."
    )
    return found


def find_confused(confusion: np.ndarray, names: Sequence[str], where: str) -> list[str]:
    """The classes that are confused most, if any are."""
    pairs = [f"{true} taken for {predicted} ({times}x)" for true, predicted, times in confused(confusion, names)[:_FEW]]
    return [f"Most often confused{where}: {', '.join(pairs)}."] if pairs else []


def find_in_training(run: Run) -> list[str]:
    """Whether the last evaluation was the best one."""
    found = []
    for name in [*run.evaluated("AP"), *run.evaluated("top1")][:1]:
        iterations, values = run.series(name)
        if not values:  # a test set without objects has no AP
            continue
        best = int(np.argmax(values))
        if values[best] - values[-1] >= FAR:
            found.append(
                f"{name} was highest at iteration {iterations[best]}, {values[best]:.1f}, and is {values[-1]:.1f} at "
                "the end: train for less long, or take model_best.pth."
            )
        elif len(values) > 2 and best == len(values) - 1 and values[-1] - values[-2] >= FAR:
            found.append(f"{name} still rose at the end, by {values[-1] - values[-2]:.1f}: train for longer.")
    return found


def confused(confusion: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, int]]:
    """What was taken for what, and how often, the most frequent first."""
    pairs = [(row, column) for row, column in np.argwhere(confusion).tolist() if row != column]
    pairs.sort(key=lambda pair: -confusion[tuple(pair)])
    return [(names[row], names[column], int(confusion[row, column])) for row, column in pairs]


def _advice(first: str, name: str, gain: float) -> str:
    if gain > 0 and first == "population" and name == "recomputed":
        return " The moving averages lag behind: set TEST.RECOMPUTE.IN_CHECKPOINT True to keep recomputed ones."
    if gain > 0 and first == "population" and name == "minibatch":
        return " The population statistics do not fit these images: look at how the norms form their batches."
    return ""


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.1f}"
