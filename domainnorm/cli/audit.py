"""Audit the norms of a model: what is wrong, how severe it is, and how to fix it.

    domainnorm audit --config-file F [--weights RUN_OR_FILE] [--number N] [--leak] [--exact] [--score]
        [--html FILE] [--json FILE] [--threshold NAME=VALUE] [--strict] KEY VALUE …
    domainnorm audit module:function [--score module:function] …

The first form audits a model of this library, on images as in its training. The second audits any torch model: the
function, in a module or in `path/to/file.py`, takes no arguments and returns `(model, batches)`, or a dict of arguments
of `dn.audit`.
"""

import argparse
import importlib
import importlib.util
import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..auditing import Report, Thresholds, audit
from ..auditing.report import check_page
from ..config import load_config
from ..engine.audit import audit_config
from ..engine.checkpoint import other_choices
from ..engine.streams import tolerant_streams
from ..errors import UserError, quote
from ..modeling import build_model
from ..output import output_folder, replace_file
from ..paths import user_path
from ..prediction.predictor import checkpoint_of, config_of
from . import Parser

NUMBER = 64  # of images
_WORDS = ("leak", "exact")  # options that dn.audit has, too


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """KEY VALUE pairs, or module:function, may stand before, between or after the others."""
    parser = Parser(description="Audit the norms of a model.", allow_abbrev=False)
    parser.add_argument(
        "--config-file", metavar="FILE", help="config of a model of this library, whose weights are MODEL.WEIGHTS"
    )
    parser.add_argument("--weights", metavar="RUN_OR_FILE", help="the folder of a run, or a checkpoint with its config")
    parser.add_argument("--number", type=int, help=f"number of training images; {NUMBER} by default")
    parser.add_argument("--leak", action="store_true", help="also compare with batches whose samples are mixed")
    parser.add_argument("--exact", action="store_true", help="also compare with the exact statistics of the batches")
    parser.add_argument(
        "--score",
        nargs="?",
        const="",
        metavar="module:function",
        help="score the model as it is and with each remedy, by a function of the model or by AP or top1",
    )
    parser.add_argument("--html", metavar="FILE", help="write an HTML page; needs matplotlib")
    parser.add_argument("--json", metavar="FILE", help="write all figures to a JSON file")
    parser.add_argument(
        "--threshold",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="value from which on a figure is a finding",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if there is an error or a warning")
    parser.add_argument(
        "what", nargs="*", metavar="module:function | KEY VALUE", help="a model and batches, or config options"
    )
    args = parser.parse_intermixed_args(argv)
    if not (args.config_file or args.weights) and len(args.what) != 1:
        parser.error(f"expected --config-file, --weights or one module:function, got {args.what}")
    if args.number is not None and args.number < 1:
        parser.error(f"--number takes 1 or more, got {args.number}")
    return args


def report_of(args: argparse.Namespace) -> Report:
    """Run the audit that the arguments ask for.

    Raises:
        UserError: what is wrong with them, with the config or the data.
    """
    options: dict[str, Any] = {name: True for name in _WORDS if getattr(args, name)}
    options["thresholds"] = Thresholds.of(_thresholds(args.threshold))
    if not (args.config_file or args.weights):
        return _audit_function(args, options)
    if args.score:
        raise UserError(f"--score takes no value beside --config-file or --weights, got {args.score!r}: put it last")
    if args.weights:
        cfg = config_of(checkpoint_of(args.weights), args.config_file, args.what)
    else:
        cfg = load_config(args.config_file, args.what)
    if not cfg.MODEL.WEIGHTS:
        raise UserError("MODEL.WEIGHTS is empty: name the run or the checkpoint to audit by --weights")
    model = build_model(cfg, trained=True)
    if others := other_choices(cfg, cfg.MODEL.WEIGHTS):
        print(f"warning: {others}", file=sys.stderr)
    return audit_config(cfg, model, args.number or NUMBER, with_score=args.score is not None, **options)


def _audit_function(args: argparse.Namespace, options: dict[str, Any]) -> Report:
    (name,) = args.what
    if args.number:
        raise UserError(f"--number goes with --config-file or --weights: {name} says how many batches there are")
    if args.score is not None:
        options["score"] = load_function(args.score, "--score")
    found = load_function(name, "audit")()
    if isinstance(found, tuple) and len(found) == 2:
        found = {"model": found[0], "batches": found[1]}
    known = inspect.signature(audit).parameters
    if not isinstance(found, dict) or not {"model", "batches"} <= found.keys() <= known.keys():
        got = sorted(map(str, found)) if isinstance(found, dict) else quote(found)
        raise UserError(f"{name} returned {got}: expected (model, batches), or a dict with any of {list(known)}")
    if not isinstance(found["model"], nn.Module):
        raise UserError(f"{name} returned a model that is {quote(found['model'])}: expected an nn.Module")
    if not args.threshold:
        options.pop("thresholds")
    return audit(**{**found, **options})


def load_function(text: str, option: str) -> Callable[..., Any]:
    """Import what `module:function` names, from a module found from the current folder, or from a file.

    Raises:
        UserError: there is no such module, file or function. What the module itself raises is passed on.
    """
    where, colon, name = text.rpartition(":")
    if not (colon and where and name.isidentifier()):
        raise UserError(f"{option}: expected module:function, or path/to/file.py:function, got {text!r}")
    is_file = where.endswith(".py")
    path = user_path(where)
    if is_file and not path.is_file():
        raise UserError(f"{option} {text!r}: no such file: {where}")
    sys.path.insert(0, str(path.resolve().parent) if is_file else str(Path.cwd()))
    if not is_file and _absent(where):
        raise UserError(f"{option} {text!r}: there is no module {where!r} here, in {Path.cwd()}, nor installed")
    module = importlib.import_module(path.stem if is_file else where)
    if is_file and Path(module.__file__ or "").resolve() != path.resolve():
        raise UserError(f"{option} {text!r}: another module is called {path.stem!r}: rename the file")
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{option} {text!r}: {where} has no function {name!r}")
    return function


def _absent(module: str) -> bool:
    """Whether there is no such module, nor a package that it would be in."""
    try:
        return importlib.util.find_spec(module) is None
    except (ModuleNotFoundError, ValueError):
        return True


def _thresholds(texts: Sequence[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError as error:
            raise UserError(f"--threshold takes NAME=VALUE, such as drift=0.2, got {text!r}") from error
    return found


def run(args: argparse.Namespace) -> int:
    """Audit, print and write; the exit code."""
    files = {name: user_path(file) for name in ("html", "json") if (file := getattr(args, name)) is not None}
    if len(set(files.values())) < len(files) or not all(file.name for file in files.values()):
        raise UserError(f"--html and --json take two files, got {[str(file) for file in files.values()]}")
    for name, file in files.items():  # what is wrong with them shows before the model runs
        output_folder(file.parent, f"--{name}")
    if "html" in files:
        check_page()
    report = report_of(args)
    print(report, flush=True)
    for name, file in files.items():
        with replace_file(file) as stream:
            stream.write(report.to_html() if name == "html" else report.to_json())
    return int(args.strict and not report.healthy)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 with --strict after an error or a warning, 2 after a mistake in what the user gave."""
    logging.getLogger("domainnorm").setLevel(logging.WARNING)
    with tolerant_streams():
        try:
            return run(parse(argv))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
        except KeyboardInterrupt:
            return 130
        except Exception:  # of the user's own code, most likely: told whole, and no finding (1)
            traceback.print_exc()
            return 2
