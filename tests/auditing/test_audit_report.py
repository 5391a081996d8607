"""What a report says: in a terminal, as JSON."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import domainnorm as dn
from domainnorm.auditing import Finding, Place, Report, Thresholds
from domainnorm.auditing.text import LINES, site_names


class SharedHead(nn.Module):
    """Levels that differ, in one head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
        self.unused = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.stem(x)
        return [self.head(y), self.head(0.1 * y + 1), self.head(3 * y)]


def batches(count=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 16, 16, generator=generator) for _ in range(count)]


def trained(model):
    with torch.no_grad():
        for _ in range(20):
            for batch in batches():
                model.train()(batch)
    return model.eval()


@pytest.fixture(scope="module")
def broken():
    torch.manual_seed(0)
    return dn.audit(trained(SharedHead()), batches(), progress=False)


@pytest.fixture(scope="module")
def healthy():
    torch.manual_seed(0)
    return dn.audit(trained(SharedHead().stem), batches(), progress=False)


def finding(level="error", message="It is wrong.", places=2, **others):
    kind = {"check": "drift", "kind": "kind", "value": 1.0, "threshold": 0.1, "unit": "nats a channel", **others}
    where = tuple(Place(f"layer{k}", value=1.0 - k / 100) for k in range(places))
    return Finding(level=level, message=message, places=where, paper="3.1", remedy="dn.fix(model)", **kind)


def made(findings, rows=0, **others):
    figures = ("divergence", "expected", "inference", "drift", "alone", "propagated", "between_batches", "padded")
    figures += ("rounded", "dead_channels", "initial_weight")
    layers = [
        {"layer": f"layer{k}", "kind": "BatchNorm2d", "call": 0, "domain": 0, "channels": 4, "samples": 8}
        | {"elements": 64.0, "frozen": False}
        | dict.fromkeys(figures, float(k))
        for k in range(rows)
    ]
    given = {"output_change": 0.5, "changed_alone": {}, "samples": 16, "batches": 2, "passes": 2, "not_reached": []}
    return Report(findings, layers, norms=rows, thresholds=Thresholds(), **given | others)


def test_a_broken_model(broken):
    lines = str(broken).splitlines()
    first = broken.findings[0]
    assert lines[0] == f"{broken.counts['error']} errors, 0 warnings, 0 notes in 3 norms of SharedHead"
    assert broken.counts["error"] == len(broken.findings) == 2 and not broken.healthy
    text = " ".join(str(broken).split())
    order = [
        f"error: {first.message}",
        f"where: nats a channel (threshold 0.1): head.1, call 1: {first.places[0].value:.3g}; head.1, call 0:",
        "repair: dn.DomainBatchNorm(num_features, num_domains=3), called with the list of inputs",
        "config: MODEL.RETINANET.POPULATION_STATISTICS per_domain",
        'paper: Rethinking "Batch", 5.2, Table 5, row 3',
        f"error: {broken.findings[1].message}",
        "farthest from statistics inference own alone propagated head.1, call 1",
        "measured: 48 samples in 6 batches, 2 passes; 3 norms, 4 calls and domains",
        "not reached: 1 (unused)",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert max(map(len, lines)) <= 100 and len(lines) <= LINES


def test_the_figures_of_the_table_are_those_of_the_layers(broken):
    lines = str(broken).splitlines()
    (row,) = (line.split()[-4:] for line in lines if line.startswith("stem.1"))
    (layer,) = (layer for layer in broken.layers if layer["layer"] == "stem.1")
    keys = ("inference", "divergence", "alone", "propagated")
    assert [float(cell) for cell in row] == [pytest.approx(layer[key], rel=5e-3) for key in keys]
    shown = [line.rsplit(maxsplit=4)[0] for line in lines if line.startswith(("stem.1 ", "head.1, call"))]
    assert shown == ["head.1, call 1", "head.1, call 0", "head.1, call 2", "stem.1"]


def test_a_healthy_model_is_one_line(healthy):
    assert str(healthy) == "healthy: no error and no warning in 1 norm of Sequential; 48 samples in 6 batches"
    assert healthy.healthy and healthy.findings == []
    assert repr(healthy) == f"<Report: {healthy}>"


def test_notes_come_after_that_line():
    report = made([finding("note", "It may be shorter.")], rows=3)
    first, *others = str(report).splitlines()
    assert report.healthy and first.startswith("healthy: no error and no warning in 3 norms of model")
    assert others == [
        "note: It may be shorter.",
        "  where:  nats a channel (threshold 0.1): layer0: 1; layer1: 0.99",
        "  repair: dn.fix(model)",
        "  paper:  3.1",
    ]


def test_what_was_not_reached_is_said_of_a_healthy_model():
    text = str(made([], rows=3, not_reached=["a", "b"]))
    assert text.endswith("16 samples in 2 batches; 2 of them not reached") and "\n" not in text


def test_a_model_without_norms():
    report = dn.audit(nn.Linear(3, 2), [torch.randn(4, 3)], progress=False)
    assert str(report) == "nothing to audit: no layer of Linear normalizes by running statistics"


@pytest.mark.parametrize("count", [1, 3, 10, 30, 200])
@pytest.mark.parametrize("rows", [0, 500])
def test_at_most_40_lines_whatever_the_model(count, rows):
    """The first in full, each of the others in a line at least, as far as there is space."""
    levels = ["error", "warning", "note"]
    findings = [finding(levels[k * 3 // count], f"{k} is wrong. " + "long " * 150, places=300) for k in range(count)]
    report = made(findings, rows, not_reached=[f"name_{k}" * 5 for k in range(100)])
    report.scores = [{"what": f"with remedy {k}", "score": k / 7} for k in range(20)]
    report.leak = {f"figure_{k}": k / 7 for k in range(30)}
    lines = str(report).splitlines()
    assert len(lines) <= LINES and max(map(len, lines)) <= 100
    assert [line for line in lines if "0 is wrong" in line] and "  repair: dn.fix(model)" in lines
    shown = [k for k in range(count) if any(f": {k} is wrong." in line for line in lines)]
    assert shown == list(range(len(shown))) and len(shown) >= min(count, 3)
    if len(shown) < count:
        assert f"and {count - len(shown)} more findings" in lines


def test_scores_as_they_are_and_with_each_remedy():
    report = made([finding()], rows=1)
    report.scores = [{"what": "as it is", "score": 0.19}, {"what": "own statistics at head.1", "score": 1.8}]
    lines = str(report).splitlines()
    place = lines.index("remedy                    score")
    assert lines[place + 1 : place + 3] == ["as it is                   0.19", "own statistics at head.1    1.8"]


def test_long_names_keep_their_end():
    report = made([finding()], rows=1)
    report.layers[0]["layer"] = "block." * 30 + "norm"
    (line,) = (line for line in str(report).splitlines() if line.startswith("…"))
    assert line.split()[0] == ("block." * 30 + "norm")[-59:].rjust(60, "…") and len(line) <= 100


def test_call_and_domain_are_named_where_a_layer_has_several():
    sites = [("a", 0, 0), ("b", 0, 0), ("b", 1, 0), ("c", 0, 1), ("d", 0, 0), ("d", 0, 1)]
    rows = [dict(zip(("layer", "call", "domain"), site, strict=True)) for site in sites]
    assert site_names(rows) == ["a", "b, call 0", "b, call 1", "c, domain 1", "d, domain 0", "d, domain 1"]


def strictly(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_has_everything(broken):
    content = strictly(broken.to_json())
    assert content.keys() == {f.name for f in dataclasses.fields(Report)} | {"healthy", "counts"}
    assert content["healthy"] is False and content["counts"] == {"error": 2, "warning": 0, "note": 0}
    assert content["thresholds"] == dataclasses.asdict(broken.thresholds)
    assert content["output_change"] == broken.output_change and content["not_reached"] == ["unused"]
    assert content["layers"] == broken.layers
    first = content["findings"][0]
    assert first.keys() == {f.name for f in dataclasses.fields(Finding)}
    assert first["places"][0] == dataclasses.asdict(broken.findings[0].places[0])
    assert first["details"]["alike"] == {"head.1": [[0], [1], [2]]}


def test_json_has_null_for_what_is_no_number():
    report = made([finding(value=math.inf, details={1: (math.nan, -math.inf, 2.5)})], rows=1, output_change=math.nan)
    report.leak, report.scores = {"loss": math.nan}, [{"what": "as it is", "score": math.nan}]
    content = strictly(report.to_json())
    assert content["findings"][0]["value"] is content["output_change"] is content["leak"]["loss"] is None
    assert content["findings"][0]["details"] == {"1": [None, None, 2.5]}
    assert content["scores"] == [{"what": "as it is", "score": None}]
    assert "nan" not in str(report) and "inf" in str(report)


def test_a_report_of_nan_is_text():
    model = trained(SharedHead())
    model.stem[1].running_var[0] = math.nan
    report = dn.audit(model, batches(2), progress=False)
    assert "broken statistics" in {finding.kind for finding in report.findings}
    assert len(str(report).splitlines()) <= LINES
    strictly(report.to_json())


def test_text_and_json_need_torch_alone():
    code = (
        "import sys, torch, domainnorm as dn; model, batches = torch.nn.BatchNorm1d(3), [torch.randn(4, 3)];"
        "report = dn.audit(model, batches, progress=False); str(report), report.to_json();"
        "print(*[n for n in ('matplotlib', 'torchvision', 'fvcore') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
