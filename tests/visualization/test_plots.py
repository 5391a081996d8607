"""Figures: what they show, read from their lines, texts and images."""

import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from domainnorm.visualization import plots


def shown(axes):
    """Of each line with a name its points."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_label()[0] != "_"}


def test_a_png():
    content = plots.png(plots.lines({"a": {"x": ([1, 2], [3, 4])}}, "iteration"))
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG" and image.width > 600 and len(np.unique(np.asarray(image))) > 20


def test_lines_one_panel_above_the_other():
    figure = plots.lines({"loss": {"a": ([1, 2], [3, 4]), "none": ([], [])}, "AP": {"b": ([5], [6])}}, "iteration")
    loss, precision = figure.axes
    assert loss.get_title("left") == "loss" and shown(loss) == {"a": [[1, 3], [2, 4]]}
    assert shown(precision) == {"b": [[5, 6]]} and precision.get_xlabel() == "iteration"
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["a"]


def test_precision_by_recall_has_ap50_in_its_names():
    curves = {"cat": np.full(101, 0.5), "dog": np.linspace(1, 0, 101)}
    (axes,) = plots.precision_by_recall(curves).axes
    assert list(shown(axes)) == ["cat: AP50 50.0", "dog: AP50 50.0", "mean of 2: AP50 50.0"]
    points = np.array(shown(axes)["mean of 2: AP50 50.0"])
    np.testing.assert_allclose(points[:, 0], np.linspace(0, 1, 101))
    np.testing.assert_allclose(points[:, 1], (curves["cat"] + curves["dog"]) / 2)


def test_of_eighty_classes_the_mean_is_named():
    (axes,) = plots.precision_by_recall({str(k): np.full(101, k / 100) for k in range(80)}).axes
    assert len(axes.lines) == 81 and list(shown(axes)) == ["mean of 80: AP50 39.5"]
    curves = {str(k): ([0.9, 0.1], [0.2, 0.3]) for k in range(80)}
    (axes,) = plots.f1_by_score(curves | {"over all": ([0.9, 0.4], [0.3, 0.6])}, (0.4, 0.6)).axes
    assert list(shown(axes)) == ["over all", "F1 0.600 from a score of 0.400 on"]
    assert shown(axes)["F1 0.600 from a score of 0.400 on"] == [[0.4, 0.6]]


def test_f1_without_anything_right():
    (axes,) = plots.f1_by_score({"cat": ([], []), "over all": ([], [])}, None).axes
    assert list(shown(axes)) == ["cat", "over all"]


def test_a_confusion_matrix_has_counts_and_shares_of_rows():
    confusion = np.array([[6, 2, 0], [0, 0, 0]])
    axes = plots.confusion_matrix(confusion, ["cat", "dog"], ["cat", "dog", "missed"]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["6", "2", "0", "0", "0", "0"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25, 0], [0, 0, 0]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog", "missed"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


@pytest.mark.parametrize("number", [1, 16, 80, 200])
def test_large_matrices_have_no_numbers_and_fit(number):
    names = [f"class {k}" for k in range(number)]
    figure = plots.confusion_matrix(np.eye(number, dtype=int), names, names)
    assert len(figure.axes[0].texts) == (1 if number == 1 else 0)
    assert Image.open(io.BytesIO(plots.png(figure))).width < 3300


def test_along_depth_is_as_wide_as_its_names_need():
    names = [f"layer{k}.norm" for k in range(80)]
    values = [0.0, float("nan"), *(k / 10 for k in range(78))]
    figure = plots.along_depth(names, {"a": {"x": values, "y": [1.0] * 80}, "b": {"z": [0.001] * 80}}, {"a": 0.1})
    first, second = figure.axes
    assert figure.get_figwidth() == pytest.approx(1.2 + 0.17 * 80)
    assert [label.get_text() for label in second.get_xticklabels()] == names
    assert shown(first).keys() == {"x", "y", "threshold 0.1"} and shown(second).keys() == {"z"}
    np.testing.assert_allclose(np.array(shown(first)["x"])[:, 1], values)
    assert first.get_yscale() == "symlog" and first.get_ylim() == (0, pytest.approx(77.0))
    assert plots.png(figure)


def test_along_depth_of_very_many_layers_names_some():
    names = [f"layer{k}" for k in range(1000)]
    figure = plots.along_depth(names, {"a": {"x": [1.0] * 1000}}, {})
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert figure.get_figwidth() == 60 and labels == names[::3]
