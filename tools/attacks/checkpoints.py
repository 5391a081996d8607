"""Resume from damaged checkpoints (bytes, values or their pointer): a training resumes, or the error is one line.

Each attempt runs in its own process, so that a crash counts as one failure only.
"""

import argparse
import copy
import random
import shutil
import time
from pathlib import Path
from random import Random
from typing import Any

import torch

import domainnorm as dn
from domainnorm.engine.optim import build_optimizer

from .outcome import Outcomes, in_child, refusal
from .tiny import MODELS, words, write_data

ITERATIONS = 2  # of the training whose checkpoint is damaged
OTHERS = (None, True, 0, -1, 1.5, 2**40, "", "x", b"x", [], {}, [0], {"a": 1}, torch.tensor(0.0), torch.zeros(0))
POINTERS = (
    *(b"", b"\n", b"\xff\xfe", b"\0", b".", b"..", b"/", b"/dev/null", b"../run/model.pth", b"nowhere.pth"),
    *(b"x" * 5000, b"model_final.pth\nmodel_final.pth", b"~", b"last_checkpoint", b"config.yaml"),
)


def damage(random: Random, folder: Path) -> str:
    """Change the last checkpoint of `folder`, or what points at it; returns how."""
    pointer = folder / "last_checkpoint"
    file = folder / pointer.read_text(encoding="utf-8").strip()
    way = random.choice(("bytes", "bytes", "values", "values", "values", "pointer"))
    if way == "pointer":
        pointer.write_bytes(random.choice(POINTERS))
    elif way == "bytes":
        file.write_bytes(_bytes(random, bytearray(file.read_bytes())))
    else:
        content = torch.load(file, weights_only=True)
        for _ in range(random.choice((1, 1, 2))):
            _change(random, content)
        torch.save(content, file)
    return way


def _bytes(random: Random, content: bytearray) -> bytes:
    way, position = random.randrange(6), random.randrange(len(content))
    if way == 0:
        content[position] ^= 1 << random.randrange(8)
    elif way == 1:
        del content[position:]
    elif way == 2:
        content[position : position + 512] = bytes(512)
    elif way == 3:
        content += random.randbytes(100)
    elif way == 4:
        del content[position : position + 1 + random.randrange(1000)]
    else:
        content[: random.choice((4, 30, 200))] = random.randbytes(4)
    return bytes(content)


def _change(random: Random, content: Any) -> None:
    """Replace, reshape, convert, rename or remove something in a checkpoint."""
    node: Any = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = random.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and random.random() < 0.9:
            node = node[key]
            continue
        break
    way, value = random.randrange(4), node[key]
    if way == 0:
        del node[key]
    elif way == 1 and isinstance(node, dict):
        node[random.choice((3, None, f"{key}.x", random.choice(keys)))] = node.pop(key)
    elif isinstance(value, torch.Tensor) and way == 2:
        node[key] = random.choice(
            (
                *(value.flatten(), value[None], value.double(), value.half(), value.to(torch.int64), value.to_sparse()),
                *(torch.zeros(3), torch.full_like(value, float("nan")) if value.is_floating_point() else value + 1),
                *(torch.zeros(()).expand(value.shape), value.to("meta"), torch.zeros(*value.shape, 2)),
            )
        )
    else:
        node[key] = copy.deepcopy(random.choice(OTHERS))


def resume(options: dict[str, Any]) -> str | None:
    """Go on by one iteration; None, or the line with which it was refused."""
    start = time.perf_counter()
    try:
        dn.train(dn.load_config(None, words(options | {"SOLVER.MAX_ITER": ITERATIONS + 1})), resume=True)
    except dn.UserError as error:
        return refusal(error, start)
    return refusal(None, start)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, default="RetinaNet")


def attack(args: argparse.Namespace, folder: Path) -> Outcomes:
    torch.set_num_threads(1)  # or the processes begin with threads that they do not have
    outcomes = Outcomes(args.seed)
    options = MODELS[args.model] | {
        "DATASETS.TRAIN": [write_data(args.model, folder / "data")],
        "OUTPUT_DIR": str(folder / "run"),
        "SOLVER.MAX_ITER": ITERATIONS,
        "SOLVER.OPTIMIZER": "AdamW",
    }
    cfg = dn.load_config(None, words(options))
    build_optimizer(cfg, dn.build_model(cfg))  # so that what it imports is there in each process
    in_child(lambda: dn.train(cfg) and None)
    for number in range(args.number):
        output = folder / f"run{number}"
        shutil.copytree(folder / "run", output)
        way = damage(random.Random(f"{args.seed} {number}"), output)
        own = options | {"OUTPUT_DIR": str(output)}
        outcomes.count(number, f"damaged by {way}", lambda own=own: in_child(lambda: resume(own)))
        shutil.rmtree(output)
    return outcomes
