"""A Sphinx extension: what pages of the reference hold that is generated when the site is built.

A comment `<!-- config keys -->` in a page becomes tables of all keys, and `<!-- help of COMMAND -->` what the command
prints with `--help`; the command is `domainnorm NAME` or a file in `tools/`.
"""

import contextlib
import io
import os
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

from domainnorm import cli
from domainnorm.config.explain import comment, facts
from domainnorm.config.option import Option
from domainnorm.config.schema import OPTIONS, SECTIONS

ROOT = Path(__file__).parents[1]
PAGES = ["reference/config", "reference/tools"]  # read anew in each build


def config_tables() -> str:
    """A heading and a table for each section of the config, in Markdown."""
    parts = []
    for section in SECTIONS:
        own = [option for option in OPTIONS.values() if option.key.rpartition(".")[0] == section]
        if own or comment(section):
            rows = ["| key | what it does |", "|---|---|", *map(_row, own)] if own else []
            parts += [f"## {section or 'At the top'}", _linked(comment(section), section), "\n".join(rows)]
    return "\n\n".join(parts)


def _row(option: Option) -> str:
    known = facts(option)
    takes = [known["type"], known.get("range", "")]
    if "choices" in known:
        takes = ["any of " * option.is_list + ", ".join(f"`{choice}`" for choice in known["choices"].split(", "))]
    if "length" in known:
        takes.append(f"length {known['length']}")
    said = [f"Default: `{known['default']}`.", f"Takes: {', '.join(filter(None, takes))}."]
    if "used by" in known:
        said.append(f"Used by: {known['used by']}.")
    if "old name" in known:
        said.append(f"Old name: `{known['old name'].rpartition('.')[2]}`.")
    section, _, name = option.key.rpartition(".")
    return f"| [`{name}`]{{#{_anchor(option.key)}}} | {_linked(option.doc, section)}<br>{' '.join(said)} |"


def _anchor(key: str) -> str:
    """The anchor of a key in the page: `solver-base-lr`; MyST takes no dots there."""
    return re.sub(r"[._]", "-", key.lower())


def _linked(text: str, section: str) -> str:
    """Text as Markdown in which the names of options are links to them."""
    text = re.sub(r"[\\`*_{}\[\]<>#|$]", r"\\\g<0>", text)

    def link(match: re.Match) -> str:
        word = match[0].replace("\\", "")
        key = next((key for key in (word, f"{section}.{word}") if key in OPTIONS), None)
        return f"[`{word}`](#{_anchor(key)})" if key else f"`{word}`" if "_" in word else match[0]

    return re.sub(r"\b[A-Z](?:[A-Z0-9.]|\\_)*[A-Z0-9]\b", link, text)


def help_of(command: str) -> str:
    """What a command prints with `--help`, in 80 columns."""
    program, *words = command.split()
    path = [str(ROOT / "tools"), str((ROOT / program).parent), *sys.path]
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="80", NO_COLOR="1"),
        mock.patch.object(sys, "argv", [program, *words, "--help"]),
        mock.patch.object(sys, "path", path),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main = cli.main if program == "domainnorm" else runpy.run_path(str(ROOT / program), run_name="tool")["main"]
        main()
    return printed.getvalue()


def fill(app, docname: str, source: list[str]) -> None:
    """The comments of a page, replaced."""
    if docname in PAGES:
        text = source[0].replace("<!-- config keys -->", config_tables())
        source[0] = re.sub(r"<!-- help of (.+?) -->", lambda match: f"```text\n{help_of(match[1]).strip()}\n```", text)


def setup(app) -> dict:
    """What Sphinx calls."""
    app.connect("source-read", fill)
    app.connect("env-get-outdated", lambda *_: PAGES)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
