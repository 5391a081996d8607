"""The code in Markdown pages: Python blocks run in order, the commands of bash blocks are parsed as their tools do.

A comment on the line above a block says what is special about it:

    <!-- run -->            of bash: it is executed, too, in the folder of the page
    <!-- slow -->           it takes seconds; also `run, slow`
    <!-- not run: why -->   of Python: it is compiled only; of bash: its commands are not looked at
"""

import argparse
import contextlib
import doctest
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import yaml

from domainnorm import cli
from domainnorm.config import OPTIONS, RENAMED, flatten, load_config
from domainnorm.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>.+?) -->\n)?(?P<fence>```+)(?P<language>\w+)\n(?P<code>.*?)^(?P=fence)$", re.M | re.S
)
_SCRIPTS = {  # what a shell finds where the library is installed
    "python": f'exec "{sys.executable}" "$@"',
    "domainnorm": f'exec "{sys.executable}" -c "import sys; from domainnorm.cli import main; sys.exit(main())" "$@"',
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and what the comment above it says."""

    page: Path
    line: int  # of the first line of code
    language: str
    code: str
    mark: str

    @property
    def runs(self) -> bool:
        return (self.language in ("python", "pycon") and not self.skipped) or "run" in self.mark.split(", ")

    @property
    def skipped(self) -> bool:
        return self.mark.startswith("not run")

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}, line {self.line}"


def blocks(page: Path) -> list[Block]:
    """Those of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start("code")) + 1, found["language"], found["code"], found["mark"] or "")
        for found in _BLOCK.finditer(text)
    ]


def run_page(page: Path, folder: Path) -> dict[str, Any]:
    """Run what a page says in `folder`, which looks like a checkout; returns the names that its Python blocks leave."""
    for name in ("configs", "docs", "domainnorm", "examples", "tools"):
        (folder / name).symlink_to(ROOT / name)
    scripts = folder / ".bin"
    scripts.mkdir()
    for name, code in _SCRIPTS.items():
        (scripts / name).write_text(f"#!/bin/sh\n{code}\n")
        (scripts / name).chmod(0o755)
    names: dict[str, Any] = {"__name__": "page"}
    with mock.patch.dict("os.environ", PYTHONPATH=str(ROOT)):
        for block in blocks(page):
            if not block.runs:
                continue
            if block.language == "pycon":
                test = doctest.DocTestParser().get_doctest(block.code, names, block.place, str(page), block.line)
                runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
                assert runner.run(test, clear_globs=False).failed == 0, block.place
                names.update(test.globs)
            elif block.language == "python":
                source = "\n" * (block.line - 1) + block.code  # so that tracebacks name the line of the page
                exec(compile(source, str(page), "exec"), names)
            else:
                script = f'set -euo pipefail\nPATH="{scripts}:$PATH"\n{block.code}'
                done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True)
                assert done.returncode == 0, f"{block.place}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return names


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a shell script, without what a shell does: variables that are set, loops, pipes."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if word and word[0] in ";&|<>":
                if command:
                    yield command
                command = []
            elif command or not re.fullmatch(r"do|then|else|done|fi|nohup|srun|\w+=.*", word, re.S):
                command.append(word)


class _Parsed(BaseException):
    """What a tool made of its arguments; it goes no further."""


def check_command(words: list[str]) -> argparse.Namespace | None:
    """Parse a command of this library, a tool or an example as it does itself, and look at the config that it names.

    Returns:
        What the tool made of its arguments; None for other programs.

    Raises:
        AssertionError: there is no such file, option or key.
    """
    for place, word in enumerate(words[:12]):  # after python, torchrun and its options
        if word == "domainnorm" and place == 0:
            return _check(cli.main, words)
        if re.match(r"(tools|examples)/.*\.py$", word):
            assert (ROOT / word).is_file(), f"there is no {word}"
            if "argparse" not in (text := (ROOT / word).read_text(encoding="utf-8")) and "domainnorm.cli" not in text:
                return None
            paths = [str(ROOT / "tools"), str((ROOT / word).parent), *sys.path]
            with mock.patch.object(sys, "path", paths):
                return _check(runpy.run_path(str(ROOT / word), run_name="tool")["main"], words[place:])
        if re.match(r"(tools|examples|\.ci)/", word):
            assert (ROOT / word).exists(), f"there is no {word}"
    return None


def _check(main: Any, words: list[str]) -> argparse.Namespace:
    def stop(original: Any) -> Any:
        def parse(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
            raise _Parsed(original(parser, args, namespace))

        return parse

    def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise UserError(message)

    kind, printed = argparse.ArgumentParser, io.StringIO()
    with (
        mock.patch.object(kind, "parse_args", stop(kind.parse_args)),
        mock.patch.object(kind, "parse_intermixed_args", stop(kind.parse_intermixed_args)),
        mock.patch.object(kind, "error", refuse),
        mock.patch.object(sys, "argv", list(words)),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        try:
            main()
        except _Parsed as parsed:
            _check_config(parsed.args[0])
            return parsed.args[0]
        except UserError as error:
            print(error)
        except SystemExit as end:
            if not end.code:  # of --help
                return argparse.Namespace()
    raise AssertionError(f"{shlex.join(words)}: {printed.getvalue()}")


def _check_config(args: argparse.Namespace) -> None:
    file = getattr(args, "config_file", None)
    options = list(getattr(args, "opts", None) or [])
    for key in options[::2]:
        assert key in OPTIONS or key in RENAMED, f"there is no key {key}"
    variable = any("$" in str(word) for word in [file, *options])
    if file and not variable and (str(file).startswith("configs/") or not file.endswith("config.yaml")):
        load_config(ROOT / file if file.startswith("configs/") else file, options)


def check_yaml(code: str) -> None:
    """Whether the keys of a config exist; other YAML is left alone."""
    content = yaml.safe_load(code)
    if isinstance(content, dict) and {"_BASE_", *(key.partition(".")[0] for key in OPTIONS)} & content.keys():
        content.pop("_BASE_", None)
        for key in flatten(content):
            assert key in OPTIONS or key in RENAMED, f"there is no key {key}"
