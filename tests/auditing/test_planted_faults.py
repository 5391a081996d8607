"""Each planted fault is named, and nothing is said of its repaired twin: the cases of tools/studies/audit_cases.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "studies"))

from audit_cases import FAULTS, audited, named, write
from audit_variants import Variant

SLOW = [pytest.param(k, marks=pytest.mark.slow) for k in (3, 5)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("k", [1, *SLOW])
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name, k):
    fault = FAULTS[name]
    given = fault.given(Variant(k), True)
    report = audited(given)
    found, first = named(fault, report, given)
    assert found and (first or not fault.first), report.findings
    worst = next(f for f in report.findings if (f.check, f.kind) == (fault.check, fault.kind))
    assert worst.level in ("error", "warning", "note") and worst.message and worst.remedy and worst.paper


@pytest.mark.parametrize("k", [1, *SLOW])
@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_said_of_its_twin(name, k):
    assert audited(FAULTS[name].given(Variant(k), False)).findings == []


def test_a_table_is_written_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x: written by tools/studies/audit_cases.py -->\nold\n<!-- end of x -->\nb\n")
    write(page, "x", "| new |\n")
    write(page, "x", "| newer |\n")
    assert page.read_text() == (
        "a\n<!-- x: written by tools/studies/audit_cases.py -->\n\n| newer |\n\n<!-- end of x -->\nb\n"
    )
    with pytest.raises(SystemExit, match="no markers"):
        write(page, "y", "")
