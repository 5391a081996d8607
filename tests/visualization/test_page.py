"""A page of HTML: all in it, nothing of it code."""

import base64
import io
import re

import torch
from PIL import Image

from domainnorm.visualization.page import Page


def pictures_in(text):
    return [
        (kind, Image.open(io.BytesIO(base64.b64decode(content))))
        for kind, content in re.findall(r'<img src="data:image/(\w+);base64,([^"]+)"', text)
    ]


def test_text_is_text():
    page = Page("a & <b>")
    page.heading("<i>", 3)
    page.text('"x" <script>')
    page.items(["1 < 2"])
    page.table(["<td>", "n"], [["a&b", "1"]])
    text = str(page)
    assert text.count("<h1>a &amp; &lt;b&gt;</h1>") == text.count("<title>a &amp; &lt;b&gt;</title>") == 1
    assert "<h3>&lt;i&gt;</h3>" in text and "&lt;script&gt;" in text and "<li>1 &lt; 2</li>" in text
    assert "<th class=word>&lt;td&gt;</th><th>n</th>" in text and "<td class=word>a&amp;b</td><td>1</td>" in text


def test_pictures_are_in_the_page():
    stream = io.BytesIO()
    Image.new("RGB", (7, 5), "red").save(stream, "PNG")
    page = Page("t")
    page.picture(stream.getvalue(), 'a "caption"')
    page.pictures([(torch.full((3, 20, 30), 200, dtype=torch.uint8), "grey")])
    text = str(page)
    (first, red), (second, grey) = pictures_in(text)
    assert (first, red.size, red.getpixel((0, 0))) == ("png", (7, 5), (255, 0, 0))
    assert (second, grey.size) == ("jpeg", (30, 20)) and abs(grey.getpixel((3, 3))[0] - 200) < 3
    assert 'alt="a &quot;caption&quot;"' in text and "<figcaption>grey</figcaption>" in text


def test_nothing_is_loaded_and_a_phone_is_told_the_width():
    page = Page("t")
    page.table(["a"], [[str(k)] for k in range(30)])
    text = str(page)
    assert "width=device-width" in text and not re.search(r"https?:|<script|<link|@import|url\(", text)
    assert 'class="scroll long"' in text


def test_a_page_within_another():
    page, other = Page("outer"), Page()
    other.heading("inner")
    page.heading("first")
    page.append(other)
    text = str(page)
    assert text.index("first") < text.index("inner") and text.count("<h1>") == 1


def test_a_script_is_there_for_a_table_that_sorts_and_only_then():
    page = Page("t")
    page.table(["<table class=sortable>"], [["1"]])
    assert "<script" not in str(page) and "<table>" in str(page)
    other = Page()
    for _ in range(2):
        other.table(["word", "n"], [["a", "1"]], sortable=True)
    page.append(other)
    text = str(page)
    assert text.count("<script>") == 1 and text.count("<table class=sortable><thead>") == 2
    assert not re.search(r"https?:|src=|import", text)


def test_code_marked_headings_and_wide_pictures():
    page = Page("t")
    page.code("a < b\n  c")
    page.heading("bad & worse", 3, mark="error")
    page.picture(torch.full((3, 20, 30), 200, dtype=torch.uint8), "wide", wide=True)
    text = str(page)
    assert "<pre>a &lt; b\n  c</pre>" in text and '<h3 class="level-error">bad &amp; worse</h3>' in text
    assert '<div class="scroll"><figure><img src="data:image/jpeg' in text
