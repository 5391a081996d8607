"""What results say, in sentences."""

from pathlib import Path

import numpy as np

from domainnorm.evaluation.findings import confused, find_confused, find_in_training, find_results
from domainnorm.evaluation.run_files import Run


def run(*values, name="population/bbox/AP"):
    return Run(Path(), None, {}, [{"iteration": 10 * k, name: value} for k, value in enumerate(values, start=1)])


def values(ap):
    return {"AP": ap, "AP50": ap, "AP75": None}


def test_differences_of_a_point_are_told_and_lesser_ones_not():
    one, *others = find_results(
        {"population": values(10.0), "recomputed": values(10.9), "minibatch": values(5.0)}, " on x"
    )
    assert one == "AP is 10.0 (AP50 10.0, AP75 -) under population statistics on x."
    assert others == ["Under minibatch statistics AP is 5.0 points lower: 5.0 on x."]


def test_what_to_do_where_population_statistics_do_not_fit():
    _, text = find_results({"population": values(10.0), "minibatch": values(15.0)}, "")
    assert "5.0 points higher: 15.0. The population statistics do not fit these images" in text


def test_nothing_to_find():
    assert find_results({"population": values(None)}, " on x") == ["There is nothing to find on x."]
    _, other = find_results({"a": values(10.0) | {"AP-cat": None, "AP-dog": 1.0, "AP-cow": 2.0}}, "")
    assert other == "The lowest AP of a class: dog 1.0; the highest: cow 2.0."


def test_the_course_of_training():
    assert find_in_training(run(10.0, 20.0, 15.0)) == [
        "population/bbox/AP was highest at iteration 20, 20.0, and is 15.0 at the end: train for less long, or take "
        "model_best.pth."
    ]
    assert find_in_training(run(10.0, 15.0, 20.0)) == [
        "population/bbox/AP still rose at the end, by 5.0: train for longer."
    ]
    assert find_in_training(run(10.0, 15.0, 14.5)) == find_in_training(run(10.0)) == find_in_training(run()) == []
    assert "top1" in find_in_training(run(90.0, 80.0, name="population/classification/top1"))[0]


def test_pairs_of_classes_by_how_often_they_are_confused():
    confusion = np.array([[50, 1, 7], [2, 60, 0], [0, 3, 9]])
    assert confused(confusion, "abc") == [("a", "c", 7), ("c", "b", 3), ("b", "a", 2), ("a", "b", 1)]
    assert find_confused(confusion, "abc", "") == [
        "Most often confused: a taken for c (7x), c taken for b (3x), b taken for a (2x)."
    ]
    assert find_confused(np.eye(3), "abc", "") == []
