"""The page of an audit: what is in it, and what a browser shows."""

import base64
import dataclasses
import html
import importlib.util
import io
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("matplotlib")

import domainnorm as dn
from domainnorm.auditing.page import BETWEEN, CHANGE, COLUMNS, DIVERGENCE, DRIFT, page_of
from domainnorm.visualization import plots

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Levels(nn.Module):
    """A head that is called on three levels, of which the second is another thing."""

    def __init__(self):
        super().__init__()
        self.a_stem_with_a_name_that_is_as_long_as_those_of_real_models = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.head = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        y = self.a_stem_with_a_name_that_is_as_long_as_those_of_real_models(x)
        return [self.head(y), self.head(0.1 * y + 1), self.head(3 * y)]


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    model, batches = Levels(), [torch.randn(8, 3, 12, 12) for _ in range(4)]
    with torch.no_grad():
        for _ in range(20):
            for batch in batches:
                model(batch)
    return dn.audit(model.eval(), batches, progress=False)


@pytest.fixture(scope="module")
def text(report):
    return report.to_html()


def test_findings_come_first(report, text):
    headings = [html.unescape(found) for found in re.findall(r"<h[123].*?>(.*?)</h", text)]
    assert headings == [
        *("Audit of Levels", "Findings", *(f"{f.level.capitalize()}: {f.kind}" for f in report.findings)),
        *("Along depth", "Layers", "What was measured", "Thresholds"),
    ]
    first = report.findings[0]
    assert first.kind == "shared statistics" and text.count("level-error") == 2 + 1  # in the style once
    said = [html.unescape(found) for found in re.findall("<li>(.*?)</li>", text)]
    assert said[:4] == [
        first.message,
        f"Figure: {first.value:.3g} nats a channel; threshold 0.1",
        f"Where: {'; '.join(f'{place}: {place.value:.3g}' for place in first.places)}",
        'Paper: Rethinking "Batch", 5.2, Table 5, row 3',
    ]
    code = html.unescape(re.search("<pre>(.*?)</pre>", text, re.S)[1])
    assert code == f"repair:  {first.remedy}\nconfig:  {first.config}"


def test_the_table_has_all_layers(report, text):
    table = re.search("<table class=sortable>(.*?)</table>", text, re.S)[1]
    rows = [re.findall("<t[hd].*?>(.*?)</t", row) for row in re.findall("<tr>(.*?)</tr>", table, re.S)]
    assert rows[0] == ["layer", "kind", "#", *COLUMNS]
    names = ["a_stem_with_a_name_that_is_as_long_as_those_of_real_models.1", *(f"head.0, call {k}" for k in range(3))]
    assert [row[:3] for row in rows[1:]] == [[name, "BatchNorm2d", str(k)] for k, name in enumerate(names)]
    for row, layer in zip(rows[1:], report.layers, strict=True):
        for cell, (key, _) in zip(row[3:], COLUMNS.values(), strict=True):
            assert float(cell) == pytest.approx(layer[key], rel=6e-3), key


def test_nothing_is_loaded(text):
    assert not re.search(r"https?:|<link|@import|url\(|<script src", text) and text.count("<script>") == 1
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    assert image.size[0] == 770 and np.asarray(image.convert("L")).std() > 10


def test_what_is_plotted_is_what_was_measured(report, monkeypatch):
    drawn = {}

    def along_depth(names, panels, limits):
        drawn.update(names=names, panels=panels, limits=limits)
        return original(names, panels, limits)

    original = plots.along_depth
    monkeypatch.setattr(plots, "along_depth", along_depth)
    page_of(report)
    assert drawn["names"][0] == "…" + report.layers[0]["layer"][-47:]  # the end of a name tells layers apart
    assert drawn["names"][1:] == [f"head.0, call {k}" for k in range(3)]
    assert drawn["panels"].keys() == {DIVERGENCE, DRIFT, CHANGE}
    assert drawn["panels"][DIVERGENCE]["own"] == [layer["divergence"] for layer in report.layers]
    assert drawn["panels"][DIVERGENCE]["inference"] == [layer["inference"] for layer in report.layers]
    assert drawn["panels"][CHANGE]["propagated"] == [layer["propagated"] for layer in report.layers]
    assert (drawn["limits"][DIVERGENCE], drawn["limits"][DRIFT]) == (0.1, 0.1)
    page = str(page_of(dataclasses.replace(report, leak={"loss_given": 1.25})))
    assert drawn["panels"][BETWEEN] == {"between": [layer["between_batches"] for layer in report.layers]}
    assert "<td class=word>loss_given</td><td>1.25</td>" in page


def test_a_healthy_model_has_a_page_too():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.BatchNorm2d(3)), [torch.randn(8, 3, 12, 12) for _ in range(4)]
    text = dn.audit(model.eval(), batches, progress=False).to_html()
    assert "healthy: no error and no warning in 1 norm of Sequential" in text and "<li>Nothing.</li>" in text


def test_a_model_without_norms_has_no_plots():
    text = dn.audit(nn.Linear(3, 2), [torch.randn(4, 3)], progress=False).to_html()
    assert "nothing to audit" in text and "<img" not in text and "<h2>Layers" not in text


def test_figures_that_are_no_numbers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).eval()
    model[0].running_var[0] = math.nan
    text = dn.audit(model, [torch.randn(8, 3, 12, 12) for _ in range(2)], progress=False).to_html()
    assert "broken statistics" in text and ">nan<" not in text


@pytest.mark.parametrize("name", ["matplotlib", "torchvision"])
def test_what_to_install(report, monkeypatch, name):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda other: None if other == name else find_spec(other))
    with pytest.raises(dn.UserError, match=rf"needs {name}, which is not installed: pip install {name}"):
        report.to_html()


def shown(text, script, tmp_path):
    """What `script` returns of the page in a window of 400 pixels."""
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    look = f"onload = () => {{ const page = frame.contentDocument; document.title = JSON.stringify(({script})(page)) }}"
    # a window is never narrower than 500 pixels
    frame = '<iframe id="frame" src="page.html" style="width:400px;height:800px;border:0"></iframe>'
    outer = f"{frame}<script>{look}</script>"
    (tmp_path / "outer.html").write_text(outer, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    options = ["--allow-file-access-from-files", "--window-size=500,900", "--virtual-time-budget=5000", "--dump-dom"]
    address = (tmp_path / "outer.html").as_uri()
    done = subprocess.run([*command, *options, address], capture_output=True, text=True, timeout=120)
    (title,) = re.findall("<title>(.*?)</title>", done.stdout)
    return json.loads(html.unescape(title))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_phone_shows_it(text, tmp_path):
    """Pictures are decoded, nothing but tables and plots is wider than the screen, and these scroll."""
    script = """page => [[...page.images].map(i => i.naturalWidth), page.documentElement.scrollWidth,
        page.querySelector("li").innerText.length > 50, [...page.querySelectorAll(".scroll")].map(e => e.clientWidth),
        frame.contentWindow.performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length]"""
    widths, content, has_text, scrolling, asked = shown(text, script, tmp_path)
    assert widths == [770] and content <= 400 and has_text and asked == 0
    assert len(scrolling) == 3 and max(scrolling) <= 400


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_click_on_a_head_sorts(report, text, tmp_path):
    script = """page => {
        const heads = [...page.querySelectorAll(".sortable th")], found = [];
        for (const name of ["inference", "inference", "layer", "#", "#"]) {
            const head = heads.find(h => h.textContent === name);
            head.click();
            const order = [...page.querySelectorAll(".sortable tbody tr")].map(r => Number(r.cells[2].textContent));
            found.push([order, heads.map(h => h.getAttribute("aria-sort")).filter(Boolean)]);
        }
        return found; }"""
    orders, marks = zip(*shown(text, script, tmp_path), strict=True)
    by_figure = sorted(range(4), key=lambda k: -float(f"{report.layers[k]['inference']:.3g}"))
    assert by_figure != [0, 1, 2, 3]
    assert list(orders) == [by_figure, by_figure[::-1], [0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]]
    assert [mark[0] for mark in marks] == ["descending", "ascending", "ascending", "descending", "ascending"]
    assert all(len(mark) == 1 for mark in marks)
