"""The documentation as a site: `python -m sphinx -W --keep-going -b html docs docs/_build/html`."""

import importlib
import sys
from pathlib import Path

from docutils import nodes

sys.path[:0] = map(str, [Path(__file__).parents[1], Path(__file__).parent])  # this tree's domainnorm; own extensions

project = "domainnorm"
author = "domainnorm developers"
version = release = importlib.import_module(project).__version__
extensions = [
    *("myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"),
    *("sphinx_copybutton", "sphinx_design", "reference_pages"),
]
exclude_patterns = ["_build"]
suppress_warnings = ["toc.not_readable"]  # pages that are still written

smartquotes = False  # '' is a value here
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4  # GitHub's anchors, for links such as page.md#a-heading

# Docstrings: Google's sections, and `code` as in Markdown
default_role = "code"
autosummary_generate = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
python_maximum_signature_line_length = 88

html_theme = "pydata_sphinx_theme"
html_title = "domainnorm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "header_links_before_dropdown": 8,
    "navbar_align": "left",
    "navbar_persistent": ["search-button"],
    "navigation_with_keys": False,
    "show_prev_next": True,
    "show_toc_level": 2,
}
copybutton_prompt_text = ">>> "


def keep_sentences(app, what, name, obj, options, lines):
    """What stands after `Returns:` is a sentence: the words before its first colon are no type."""
    for number, line in enumerate(lines[:-1]):
        if line == "Returns:":
            lines[number + 1] = lines[number + 1].replace("    ", "    : ", 1)


def keep_anchors(app, doctree):
    """All anchors of a page, not those of its headings alone, for links `page.md#anchor`: MyST 4 does not know them."""
    anchors = app.env.metadata[app.env.docname].setdefault("myst_slugs", {})
    for name, identifier in doctree.nameids.items():
        if identifier:
            anchors.setdefault(name, (0, identifier, name))


def draw_dashes(app, doctree):
    """The dash between an argument and its description: no smart quotes draw it."""
    for text in [text for text in doctree.findall(nodes.Text) if text == " -- "]:
        text.parent.replace(text, nodes.Text(" \N{EN DASH} "))


def setup(app):
    app.connect("doctree-read", draw_dashes)
    app.connect("doctree-read", keep_anchors)
    app.connect("autodoc-process-docstring", keep_sentences, priority=400)  # before napoleon's, of 500
