"""tools/studies/classification.py: every table is filled, and a run that is finished is not run again."""

import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "studies"))

import classification

SIZES = {"images": 64, "epochs": 1, "validation": 20, "test": 32, "seeds": 1}


def run(folder, **sizes):
    options = [word for k, v in (SIZES | sizes).items() for word in (f"--{k}", str(v))]
    classification.main(["--data", "patches", "--out", str(folder), *options])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run(folder)
    return folder


def test_tables_are_filled(folder):
    text = (folder / "classification.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    assert len(tables) == 13
    for table in tables:
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        assert rows and all(len(row) == len(head) for row in rows)
        assert all(any(re.match(r"[+-]?\d", cell) for cell in row[len(head) > 4 :]) for row in rows)
    assert "nan" not in text and "inf" not in text
    assert (folder / "classification.png").stat().st_size > 10_000


def test_finished_runs_are_kept(folder, monkeypatch, tmp_path):
    file = folder / "classification.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    before = (folder / "classification.md").read_text(encoding="utf-8")
    last = list(results["runs"])[-2:]
    (tmp_path / "classification.json").write_text(
        json.dumps(results | {"runs": {k: v for k, v in results["runs"].items() if k not in last}}), encoding="utf-8"
    )
    trained = []
    train = classification.train
    monkeypatch.setattr(classification, "train", lambda *args: trained.append(args) or train(*args))
    run(tmp_path)
    assert len(trained) == 2
    again = json.loads((tmp_path / "classification.json").read_text(encoding="utf-8"))
    for value in (*results["runs"].values(), *again["runs"].values()):
        del value["seconds"]
    assert again == results
    assert (tmp_path / "classification.md").read_text(encoding="utf-8") == before


def test_runs_of_other_sizes_are_not_mixed(folder, capsys):
    with pytest.raises(SystemExit):
        run(folder, images=65)
    assert "choose another --out" in capsys.readouterr().err
