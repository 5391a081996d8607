"""Load random configs and damaged YAML text: a config loads and equals itself once saved, or the error is one line.

In addition, --build tiny models are built with random options, and --train of them are trained and evaluated.
"""

import argparse
import random
import time
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

import domainnorm as dn
from domainnorm.config import save_config
from domainnorm.config.option import Option, Range
from domainnorm.config.schema import OPTIONS, RENAMED

from .outcome import Outcomes, in_child, refusal
from .tiny import MODELS, words, write_data

TEXTS = (
    *("", " ", "None", "null", "~", "true", "yes", "3", "-1", "0x1F", "010", "1:30", "1e400", "nan", ".inf", "1_0"),
    *("2020-01-01", "a: b", "[", "]", "[a, b]", "{a: b}", "(1, 2)", "'", '"', "&a [*a]", "*a", "!!int x", "# c", "%"),
    *("é", "日本", "\n", "\t", "\0", "\x1b[31m", "\u2028", "\ud800", "\U0001f600", "~/x", "~nobody-at-all/x", "../.."),
    *("x" * 300, "9" * 5000, "[" * 3000, "-" * 3000 + "1", "a\\d", "'a\\d'", "shapes_train", "a.json:b"),
)
THINGS = (
    None,
    True,
    False,
    0,
    -1,
    2**31,
    2**63,
    10**400,
    0.5,
    -0.0,
    1e-300,
    1e308,
    float("inf"),
    float("nan"),
    1j,
    b"x",
)
MARKS = (*" \n\t:-?[]{}&*!|>'\"%@`,#<", "<<: ", "- ", ": ", "? ", "_BASE_: ", "&a ", "*a", "!!int ", "---\n", "...\n")
ENCODINGS = (*["utf-8"] * 8, "utf-8-sig", "utf-16", "latin-1")


def fitting(random: Random, option: Option, largest: float = 1e30) -> Any:
    """A value that the option takes; numbers up to about `largest`, where there are such."""
    if option.is_list:
        length = option.length or random.randint(max(option.min_length, 0), option.min_length + 2)
        return [_fitting_element(random, option, largest) for _ in range(length)]
    return _fitting_element(random, option, largest)


def _fitting_element(random: Random, option: Option, largest: float) -> Any:
    allowed = option.allowed
    if isinstance(allowed, tuple):
        return random.choice(allowed)
    if isinstance(allowed, Range):
        low = max(allowed.min, allowed.above + (1 if option.type is int else 1e-9))
        high = max(low, min(allowed.max, allowed.limit, largest))
        value = random.choice((low, high, random.uniform(low, high), low + (high - low) * random.random() ** 8))
        return option.type(value)
    if option.type is bool:
        return random.choice((False, True))
    return random.choice(("", "a", "shapes_train", "a.json:b", "Köln #1: x"))


def anything(random: Random, depth: int = 2) -> Any:
    """A value of any kind."""
    kinds = (TEXTS, THINGS) if depth == 0 else (TEXTS, THINGS, "list", "dict")
    kind = random.choice(kinds)
    if kind == "list":
        return [anything(random, depth - 1) for _ in range(random.randint(0, 3))]
    if kind == "dict":
        return {random.choice(("a", 3, None, "SEED")): anything(random, depth - 1)}
    return random.choice(kind)


def overrides(random: Random) -> list[Any]:
    """`[KEY, VALUE, …]`: most values fit, some do not; a few keys are misspelled."""
    found: list[Any] = []
    for _ in range(random.randint(1, 4)):
        key = random.choice(list(OPTIONS))
        value = fitting(random, OPTIONS[key]) if random.random() < 0.7 else anything(random)
        if random.random() < 0.05:
            key = random.choice((*RENAMED, key[:-1], key.rpartition(".")[0], f"{key}.X", *TEXTS))
        found += [key, value]
    return found


def document(random: Random) -> bytes:
    """A YAML file, damaged or not."""
    tree: dict[Any, Any] = {}
    pairs = overrides(random)
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        node = tree
        *sections, name = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                break
        else:
            node[name] = value
    try:
        text = yaml.safe_dump(tree, default_flow_style=random.choice((None, False, True)))
    except (yaml.YAMLError, ValueError):  # of what YAML has no words for
        text = repr(tree)
    for _ in range(random.choice((0, 0, 1, 2, 5))):
        text = damaged(random, text)
    content = text.encode(random.choice(ENCODINGS), errors="replace")
    if content and random.random() < 0.1:
        position = random.randrange(len(content))
        content = content[:position] + bytes([random.randrange(256)]) + content[position + 1 :]
    return content


def damaged(random: Random, text: str) -> str:
    """`text` after one change."""
    begin, end = sorted(random.randint(0, len(text)) for _ in range(2))
    inserted = random.choice((random.choice(MARKS), random.choice(TEXTS), text[begin:end], ""))
    return text[:begin] + inserted + text[random.choice((begin, end)) :]


# What makes a tiny model what it is.
FIXED = (
    *("MODEL.META_ARCHITECTURE", "MODEL.DEVICE", "MODEL.WEIGHTS", "OUTPUT_DIR", "SOLVER.MAX_ITER"),
    *("DATASETS.TRAIN", "DATASETS.TEST", "DATALOADER.NUM_WORKERS"),
)


def tiny_options(random: Random, changes: int = 3) -> dict[str, Any]:
    """The options of a tiny model, some of those that it uses at random."""
    architecture = random.choice(list(MODELS))
    usable = [key for key, option in OPTIONS.items() if not option.used_by or architecture in option.used_by]
    chosen = random.sample([key for key in usable if key not in FIXED], changes)
    return MODELS[architecture] | {key: fitting(random, OPTIONS[key], largest=64) for key in chosen}


def load(source: bytes | list[Any], folder: Path) -> str | None:
    """Load a config; None, or the line with which it was refused.

    Raises:
        AssertionError: it took long, or the config that was saved is another.
    """
    start = time.perf_counter()
    file = folder / "attacked.yaml"
    try:
        if isinstance(source, bytes):
            file.write_bytes(source)
            cfg = dn.load_config(file)
        else:
            cfg = dn.load_config(None, source)
    except dn.UserError as error:
        return refusal(error, start)
    save_config(cfg, file)
    assert dn.load_config(file) == cfg, "a config that was saved is another"
    return refusal(None, start)


def build(options: dict[str, Any]) -> str | None:
    """Build a model; None, or the line with which it, or the config, was refused."""
    start = time.perf_counter()
    try:
        dn.build_model(dn.load_config(None, words(options)))
    except dn.UserError as error:
        return refusal(error, start)
    return None


def train(options: dict[str, Any], folder: Path) -> str | None:
    """Train a model for two steps and evaluate it; None, or the line with which it was refused."""
    start = time.perf_counter()
    model = options.get("MODEL.META_ARCHITECTURE", "RetinaNet")
    data_set = [write_data(model, folder / "data")]
    own = {"DATASETS.TRAIN": data_set, "DATASETS.TEST": data_set, "OUTPUT_DIR": str(folder / "run")}
    try:
        dn.train(dn.load_config(None, words(options | own)))
    except dn.UserError as error:
        return refusal(error, start)
    return refusal(None, start)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--build", type=int, default=100, help="number of models to build")
    parser.add_argument("--train", type=int, default=20, help="number of models to train")


def attack(args: argparse.Namespace, folder: Path) -> Outcomes:
    outcomes = Outcomes(args.seed)
    for number in range(args.number):
        one = random.Random(f"{args.seed} {number}")
        source = document(one) if number % 2 else overrides(one)
        outcomes.count(number, "files" if number % 2 else "overrides", partial(load, source, folder))
    for number in range(args.build):
        options = tiny_options(random.Random(f"{args.seed} build {number}"))
        outcomes.count(number, "models", partial(build, options))
    torch.set_num_threads(1)  # or the processes begin with threads that they do not have
    for number in range(args.train):
        options = tiny_options(random.Random(f"{args.seed} train {number}"))
        outcomes.count(number, "trainings", partial(in_child, partial(train, options, folder / f"{number}")))
    return outcomes
