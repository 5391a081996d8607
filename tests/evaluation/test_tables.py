"""Results as text."""

import math

import pytest

from domainnorm.evaluation.tables import by_class, format_classes, format_table, overall

OVERALL = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"), 12.5)


def scores(count, first=0.0):
    of_classes = {}
    for k in range(count):
        of_classes |= {f"AP-class-{k}": first + k, f"AR-class-{k}": math.nan if k == 1 else 50.0}
    return {"set": {"bbox": OVERALL | of_classes}}


def cells(line):
    """Of a line, which may have several columns of classes."""
    return [part.split() for part in line.split("    class-")]


def test_what_is_of_classes_and_what_is_not():
    values = scores(2)["set"]["bbox"]
    assert overall(values) == OVERALL
    assert list(by_class(values)) == ["class-0", "class-1"]
    assert by_class(values)["class-0"] == {"AP": 0.0, "AR": 50.0}


def test_three_classes_are_three_lines():
    lines = format_classes({"population": scores(3)}).splitlines()
    assert [line.split() for line in lines] == [
        *(["classes"], ["class", "AP", "AR"]),
        *(["class-0", "0.00", "50.00"], ["class-1", "1.00", "-"], ["class-2", "2.00", "50.00"]),
    ]


@pytest.mark.parametrize(
    "statistics", [["population"], ["population", "minibatch"], ["a", "b", "c", "recomputed_weighed"]]
)
def test_eighty_classes_fit_a_screen(statistics):
    """Each once, with all its numbers, in lines that are not much longer than a terminal's."""
    results = {name: scores(80, 10.0 * k) for k, name in enumerate(statistics)}
    title, *rest = format_classes(results).splitlines()
    head, *lines = rest[len(statistics) > 1 :]
    assert title == "classes" and max(map(len, rest)) <= 112
    assert len(lines) <= (40 if len(statistics) <= 2 else 80)
    found = {}
    for line in lines:
        for k, text in enumerate(line.split("class-")[1:]):
            name, *numbers = text.split()
            assert len(numbers) == 2 * len(statistics) == len(head.split("class")[k + 1].split())
            found[int(name)] = numbers
    assert sorted(found) == list(range(80))
    for k, numbers in found.items():
        assert numbers[::2] == [f"{k + 10 * s:.2f}" for s in range(len(statistics))]


def test_of_many_classes_the_worst_are_shown():
    text = format_classes({"population": scores(1000)})
    assert text.splitlines()[0] == "classes (100 of 1000, the lowest AP first)"
    assert "class-99 " in text and "class-100 " not in text and len(text.splitlines()) < 45


def test_one_class_is_all():
    assert format_classes({"population": scores(1)}) == ""


def test_a_table_for_each_set_and_kind():
    both = {"bbox": scores(2)["set"]["bbox"], "segm": scores(2, 7.0)["set"]["bbox"]}
    text = format_classes({"population": {"a": both, "b": both}})
    assert [part.splitlines()[0] for part in text.split("\n\n")] == [
        f"classes {data_set} {kind}" for data_set in "ab" for kind in ("bbox", "segm")
    ]
    assert text.split("\n\n")[1].splitlines()[2].split() == ["class-0", "7.00", "50.00"]


def test_long_names_and_statistics():
    name = "a long name of a class that nobody can read in a table"
    results = {
        key: {"set": {"classification": {"top1": 1.0, f"top1-{name}": 1.0, "top1-b": 2.0}}}
        for key in ("population", "training")
    }
    lines = format_classes(results).splitlines()
    assert lines[1].split() == ["population", "training"] and lines[2].split() == ["class", "top1", "top1"]
    assert len({len(line) for line in lines[1:]}) == 1 and lines[3].startswith("a long name of a class … ")


def test_the_table_of_all_has_what_fits_a_line():
    head, row = format_table({"population": scores(80)}).splitlines()
    assert head.split() == ["statistics", *list(OVERALL)[:9]] and row.split() == ["population", *["12.50"] * 9]
