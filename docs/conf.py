"""The documentation as a site: `python -m sphinx -W --keep-going -b html docs docs/_build/html`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's domainnorm, installed or not

import domainnorm

project = "domainnorm"
author = "domainnorm developers"
version = release = domainnorm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design"]
exclude_patterns = ["_build"]
suppress_warnings = ["toc.not_readable"]  # pages that are still written

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4  # GitHub's anchors, for links such as page.md#a-heading

html_theme = "pydata_sphinx_theme"
html_title = "domainnorm"
html_show_sourcelink = False
html_theme_options = {
    "header_links_before_dropdown": 8,
    "navigation_with_keys": False,
    "show_prev_next": True,
}
copybutton_prompt_text = ">>> "
