"""Open damaged annotation files (values, text or bytes): a data set yields samples, or the error is one line."""

import argparse
import copy
import json
import logging
import random
import time
from pathlib import Path
from random import Random
from typing import Any

import domainnorm as dn
from domainnorm.data import CocoDataset

from .outcome import Outcomes, refusal
from .tiny import write_boxes

VALUES = (
    *(None, True, False, 0, 1, -1, 2, 0.5, 1.0, -0.0, 1e-9, 1e300, float("nan"), float("inf"), 2**31, 2**63, -(2**63)),
    *(10**30, "", "0", "x", "é\n", "\0", "../x.png", "/etc/passwd", "a" * 5000, [], {}, [[]], [None], {"a": 1}),
    *([0, 0, 0, 0], [1, 2, 3], [1, 2, 3, 4, 5], ["1", 2, 3, 4], [0.1, 0.1, 0.5, 0.5], [-5, -5, 500, 500]),
    *({"size": [64, 64], "counts": [5]}, {"size": [0, 0], "counts": ""}, {"size": [64, 64], "counts": "x"}),
)
TEXTS = (*'[]{},:"-', "", "NaN", "1e999", "null", "\\ud800", "\0", "\ufeff", "[" * 5000, "9" * 5000)


def damaged(random: Random, content: dict[str, Any]) -> bytes:
    """The text of an annotation file after one to three changes."""
    content = copy.deepcopy(content)
    for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
        _change(random, content)
    text = json.dumps(content)
    if random.random() < 0.3:
        begin, end = sorted(random.randint(0, len(text)) for _ in range(2))
        text = text[:begin] + random.choice(TEXTS) + text[random.choice((begin, min(begin + 9, len(text)), end)) :]
    found = text.encode(random.choice((*["utf-8"] * 9, "utf-16")), errors="surrogatepass")
    if found and random.random() < 0.1:
        position = random.randrange(len(found))
        found = found[:position] + bytes([random.randrange(256)]) + found[position + 1 :]
    return found


def _change(random: Random, content: Any) -> None:
    """Replace, remove or repeat something in lists and objects within each other."""
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = random.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and random.random() < 0.85:
            node = node[key]
            continue
        way = random.randrange(4)
        if way == 0:
            del node[key]
        elif way == 1 and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        elif way == 2 and isinstance(node, dict):
            node[random.choice((*keys, "x"))] = copy.deepcopy(node[key])
        else:
            node[key] = copy.deepcopy(random.choice(VALUES))
        return


def open_set(file: Path, images: Path, content: bytes, **options: Any) -> str | None:
    """Open a data set and take each of its samples; None, or the line with which it was refused."""
    file.write_bytes(content)
    start = time.perf_counter()
    try:
        dataset = CocoDataset(f"{file}:{images}", **options)
        for index in range(len(dataset)):
            _, target = dataset[index]
            boxes = target["boxes"]
            assert boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all(), "a box of no area was accepted"
            assert ((target["labels"] >= 0) & (target["labels"] < len(dataset.class_names))).all(), "an unknown label"
    except dn.UserError as error:
        return refusal(error, start)
    return refusal(None, start)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def attack(args: argparse.Namespace, folder: Path) -> Outcomes:
    outcomes = Outcomes(args.seed)
    logging.getLogger("domainnorm").setLevel(logging.ERROR)  # what is left out of a file is told of each
    file, _, images = write_boxes(folder / "data", 3).rpartition(":")
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    for number in range(args.number):
        one = random.Random(f"{args.seed} {number}")
        options = {"masks": one.random() < 0.5, "invalid_boxes": one.choice(("error", "skip"))}
        found = damaged(one, content)
        outcomes.count(
            number,
            "annotation files",
            lambda found=found, options=options: open_set(folder / "damaged.json", Path(images), found, **options),
        )
    return outcomes
