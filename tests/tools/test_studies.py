"""tools/studies/run.py: rows are trained once, reports are rebuilt from results, every config takes its first steps."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import domainnorm as dn
from domainnorm.data import shapes

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "studies"))

import run
import study_report
from study_rows import COLUMNS, STUDIES, Plot, Row, Study

ROOT = Path(__file__).parents[2]

SMALL = [
    *("SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 0, "MODEL.DEVICE", "cpu", "TEST.REPORT", False),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 10, "TEST.PICTURES", 0, "TEST.RECOMPUTE.NUM_SAMPLES", 8),
]
TRAINED = {  # one row of each config; of a study on other data one row, its configs are those of another study
    (name, "" if study.data else row.config): key
    for name, study in STUDIES.items()
    for key, row in reversed(study.rows.items())
    if row.config.endswith(".yaml") and not row.weights_of
}
CLASSES = {"BLOOD": ["RBC", "WBC", "Platelets"], "NUCLEI": ["nucleus"]}
LABORATORIES = {"BLOOD": ["pbc", "bccd"], "NUCLEI": ["fluorescence", "stain"]}


@pytest.fixture
def few_images(tmp_path, monkeypatch):
    """Of the built-in sets, and in place of the cells."""
    monkeypatch.setenv("DOMAINNORM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(shapes, "COUNTS", {"train": 8, "val": 2})
    for variable, classes in CLASSES.items():
        folder = tmp_path / variable
        monkeypatch.setenv(variable, str(folder))
        for laboratory in LABORATORIES[variable]:
            for part, count in (("train", 8), ("val", 2)):
                write_cells(folder, f"{part}_{laboratory}", classes, count)


def write_cells(folder, name, classes, count):
    """Gray images of 96 pixels with a bright square of each class."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for k in range(count):
        pixels = np.full((96, 96, 3), 40, dtype=np.uint8)
        images.append({"id": k, "file_name": f"{name}_{k}.png", "height": 96, "width": 96})
        for label in range(len(classes)):
            x = 10 + 25 * label
            pixels[x : x + 20, x : x + 20] = 250 - k
            entry = {"id": len(annotations), "image_id": k, "category_id": label + 1, "bbox": [x, x, 20, 20]}
            annotations.append(entry | {"area": 400, "iscrowd": 0})
        Image.fromarray(pixels).save(folder / "images" / f"{name}_{k}.png")
    categories = [{"id": label + 1, "name": title} for label, title in enumerate(classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "row"), [(name, row) for (name, _), row in TRAINED.items()])
def test_first_steps(name, row, few_images, tmp_path):
    study = STUDIES[name]
    options = [os.path.expandvars(word) for word in study.rows[row].options]
    cfg = dn.load_config(str(ROOT / study.rows[row].config), [*options, *SMALL, "OUTPUT_DIR", str(tmp_path / "run")])
    dn.train(cfg)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for other, titled in study.rows.items():
        assert set(titled.paper) <= set(study.columns)
        if other == row or titled.results_of == row:
            assert study.value(other, results, next(iter(study.columns))) is not None


def test_rows_have_equal_budgets():
    for study in STUDIES.values():
        budgets = set()
        for row in (r for r in study.rows.values() if r.config.endswith(".yaml")):
            solver = dn.load_config(str(ROOT / row.config), list(row.options)).SOLVER
            budgets.add((solver.MAX_ITER, solver.IMS_PER_BATCH, solver.BASE_LR, solver.OPTIMIZER))
        assert len(budgets) <= 1  # a study of scripts has none


def results(population, minibatch):
    return {"population": {"bbox": {"AP": population}}, "minibatch": {"bbox": {"AP": minibatch}}}


TINY = Study(
    "A title",
    "About it.",
    {
        "one": Row("one row", "a.yaml", paper={"population AP": 30.7}),
        "other": Row("other row", "b.yaml", weights_of="one"),
        "minibatch": Row("the same row", results_of="one", columns={"population AP": "minibatch/bbox/AP"}),
        "third": Row("never run", "c.yaml"),
    },
    COLUMNS,
)
CONTENT = {
    "command": "tools/studies/run.py tiny --seeds 0 1",
    "machine": "this one",
    "conclusions": ["It shows."],
    "results": {
        "one": {
            "0": {"results": results(10.0, 20.0), "cpu_seconds": 60},
            "1": {"results": results(14.0, 20.0), "cpu_seconds": 60},
        },
        "other": {"0": {"results": {"population": {"bbox": {"AP": 5.0}}}, "cpu_seconds": 60}},
    },
}


def test_the_table():
    text = study_report.markdown(TINY, "tiny", CONTENT)
    assert "| one row | 12.0 ± 2.8 | 20.0 ± 0.0 | 30.7 | 0, 1 |" in text
    assert "| other row | 5.0 | - |  | 0 |" in text and "| the same row | 20.0 ± 0.0 | 20.0 ± 0.0 |  | 0, 1 |" in text
    assert "never run" not in text
    assert "It shows." in text and "3 runs of 1.0 CPU minutes (median), this one" in text


def test_details():
    """Of the table only: words, the most frequent first, and means."""
    study = dataclasses.replace(TINY, details={"said": "said", "seconds": "cpu/seconds"})
    runs = {str(k): {"results": results(1.0, 2.0) | {"said": word}} for k, word in enumerate("abb")}
    for k, found in enumerate(runs.values()):
        found["results"]["cpu"] = {"seconds": 10.0 + k}
        found["seconds"] = 60
    text = study_report.markdown(study, "tiny", CONTENT | {"results": {"one": runs}})
    assert "|  | population AP | minibatch AP | said | seconds | paper: population AP | seeds |" in text
    assert "| one row | 1.0 ± 0.0 | 2.0 ± 0.0 | b (2); a (1) | 11.0 ± 1.0 | 30.7 | 0, 1, 2 |" in text


def test_the_same_bytes_again(tmp_path):
    study_report.write_report(TINY, "tiny", CONTENT, tmp_path)
    first = [(tmp_path / f"tiny.{kind}").read_bytes() for kind in ("md", "png")]
    study_report.write_report(TINY, "tiny", CONTENT, tmp_path)
    assert first == [(tmp_path / f"tiny.{kind}").read_bytes() for kind in ("md", "png")]


@pytest.mark.parametrize("name", [name for name in STUDIES if (ROOT / "docs" / "studies" / f"{name}.json").exists()])
def test_committed_reports_are_those_of_their_results(name):
    folder = ROOT / "docs" / "studies"
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert (folder / f"{name}.md").read_text(encoding="utf-8") == study_report.markdown(STUDIES[name], name, content)


def test_what_is_finished_is_not_run_again(tmp_path, monkeypatch):
    trained = []

    def train(row, folder, seed, study):
        if row.title == "other row" and len(trained) == 1:
            raise dn.UserError("interrupted")
        trained.append((row.title, seed))
        return results(float(seed), 1.0), 60

    monkeypatch.setitem(STUDIES, "tiny", TINY)
    monkeypatch.setattr(run, "train", train)
    arguments = ["run.py", "tiny", "--seeds", "0", "1", "--rows", "one", "minibatch", "other", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert run.main() == 2 and trained == [("one row", 0)]
    trained.append(None)  # so that it goes on
    assert run.main() == 0
    assert trained == [("one row", 0), None, ("other row", 0), ("one row", 1), ("other row", 1)]
    before = (tmp_path / "tiny.md").read_bytes()
    assert run.main() == 0 and len(trained) == 5
    (tmp_path / "tiny.md").unlink()
    monkeypatch.setattr(sys, "argv", [*arguments[:2], "--out", str(tmp_path), "--report-only"])
    assert run.main() == 0 and (tmp_path / "tiny.md").read_bytes() == before


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    for arguments, message in (
        (["table6", "--rows", "bn"], "--rows take any of"),
        (["table6", "--report-only", "--out", str(tmp_path)], "run the study first"),
    ):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        assert run.main() == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_is_trained_and_evaluated(tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAINNORM_DATA", str(tmp_path / "data"))
    torch.manual_seed(0)
    small = (*map(str, SMALL), "DATASETS.TRAIN", "[herds_val]", "MODEL.BACKBONE.NAME", "mobilenet_v3_small")
    config = "configs/studies/table6/bn.yaml"
    row = Row("one", config, small)
    found, seconds = run.train(row, tmp_path / "work" / "one" / "seed-0", 0, tmp_path / "work")
    assert 1 < seconds < 600
    assert set(found) == {"population", "minibatch"}
    again = Row("again", config, small, weights_of="one")
    assert run.train(again, tmp_path / "work" / "again" / "seed-0", 0, tmp_path / "work")[0] == found
    broken = Row("broken", config, ("SOLVER.MAX_ITER", "none"))
    with pytest.raises(dn.UserError, match=r"exit code 2: .*broken.*log says why"):
        run.train(broken, tmp_path / "work" / "broken" / "seed-0", 0, tmp_path / "work")
    assert "SOLVER.MAX_ITER" in (tmp_path / "work" / "broken" / "seed-0.log").read_text()


def test_rows_side_by_side(tmp_path, monkeypatch):
    """As many processes at a time as there are places; what needs weights comes after them."""
    rows = {name: Row(name, "a.yaml", processes=2 if name == "two" else 1) for name in ("one", "two", "three")}
    study = Study("A title", "About it.", rows | {"eval": Row("eval", "a.yaml", weights_of="two")}, COLUMNS)
    running, seen, ended = set(), [], []

    def train(row, folder, seed, study_folder):
        running.add((row.title, seed))
        seen.append(set(running))
        time.sleep(0.05)
        running.remove((row.title, seed))
        ended.append((row.title, seed))
        return results(float(seed), 1.0), 60

    monkeypatch.setitem(STUDIES, "tiny", study)
    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(sys, "argv", ["run.py", "tiny", "--seeds", "0", "1", "--jobs", "2", "--out", str(tmp_path)])
    assert run.main() == 0
    assert sorted(ended) == sorted((name, seed) for name in study.rows for seed in (0, 1))
    assert all(sum(rows.get(name, rows["one"]).processes for name, _ in together) <= 2 for together in seen)
    assert any(len(together) == 2 for together in seen)
    for seed in (0, 1):
        assert ended.index(("two", seed)) < ended.index(("eval", seed))


def test_curves(tmp_path):
    points = [(1.0, "one", "population AP"), (2.0, "other", "population AP"), (4.0, "third", "population AP")]
    plots = [Plot(f"plot {k}", "x", "AP", {"population": points}, log=bool(k)) for k in range(3)]
    figure = study_report.curves(dataclasses.replace(TINY, plots=plots), CONTENT)
    assert [axes.get_visible() for axes in figure.axes] == [True, True, True, False]
    line = figure.axes[0].get_lines()[0]
    assert line.get_xydata().tolist() == [[1.0, 12.0], [2.0, 5.0]]  # what was never run is no point


def test_bands():
    """Between the means of two columns."""
    edges = ([(1.0, "one", "population AP")], [(1.0, "one", "minibatch AP")])
    figure = study_report.curves(dataclasses.replace(TINY, plots=[Plot("a", "x", "AP", bands={"one": edges})]), CONTENT)
    corners = figure.axes[0].collections[0].get_paths()[0].vertices
    assert {12.0, 20.0} == set(corners[:, 1].tolist())


def test_several_tables():
    tables = {"First": ["minibatch AP"], "Second": ["population AP"]}
    study = dataclasses.replace(TINY, tables=tables)
    text = study_report.markdown(study, "tiny", CONTENT)
    first, second = text.split("## Second")
    assert "## First" in first and "| one row | 20.0 ± 0.0 | 0, 1 |" in first and "other row" not in first
    assert "| one row | 12.0 ± 2.8 | 30.7 | 0, 1 |" in second and "| other row | 5.0 |  | 0 |" in second
    assert study.headline("one", results(1.0, 2.0)) == "minibatch AP 2.0"


def test_a_script_is_a_row(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "assert sys.argv[1:4] == ['--size', '3', '--seed'] and sys.argv[5] == '--out'\n"
        "out = pathlib.Path(sys.argv[6])\nout.mkdir(parents=True)\n"
        "(out / 'results.json').write_text(json.dumps({'seed': int(sys.argv[4])}))\n"
    )
    row = Row("scripted", str(script), ("--size", "3"))
    assert run.train(row, tmp_path / "work" / "scripted" / "seed-7", 7, tmp_path / "work")[0] == {"seed": 7}
    assert run.train(row, tmp_path / "work" / "scripted" / "seed-7", 7, tmp_path / "work") == ({"seed": 7}, None)


def test_weights_of_another_study(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\nout.mkdir(parents=True)\n"
        "(out / 'results.json').write_text(json.dumps({'weights': sys.argv[1]}))\n"
    )
    row = Row("scripted", str(script), weights_of="../table5/row4")
    arguments = (row, tmp_path / "audit" / "sound" / "seed-1", 1, tmp_path / "audit")
    with pytest.raises(dn.UserError, match=r"has no results: run .*run.py table5 --rows row4 --seeds 1 first"):
        run.train(*arguments)
    trained = tmp_path / "table5" / "row4" / "seed-1"
    trained.mkdir(parents=True)
    (trained / "results.json").touch()
    assert run.train(*arguments)[0] == {"weights": str(trained)}
