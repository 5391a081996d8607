#!/usr/bin/env python
"""This library's row of the study `peers`: the config of the study `shift`, its CPU seconds, AP in both laboratories.

tools/studies/peer_domainnorm.py --data FOLDER [--plain] [--seed 0] --out FOLDER
"""

import shutil
import time
from pathlib import Path

import peers

import domainnorm as dn
from domainnorm.engine.log import setup_logging

CONFIG = Path(__file__).parents[2] / "configs" / "studies" / "shift" / "base.yaml"
PLAIN = ("INPUT.MIN_SIZE_TRAIN", [peers.SIZE], "INPUT.RANDOM_FLIP", 0.0)


def main() -> None:
    parser = peers.parser(__doc__)
    parser.add_argument("--steps", type=int, help="number of steps, instead of the config's")
    args = parser.parse_args()
    sets = {
        split: [f"{name}={args.data}/{split}_{name}.json:{args.data}/images" for name in peers.LABORATORIES]
        for split in ("train", "val")
    }
    run = args.out / "run"
    shutil.rmtree(run, ignore_errors=True)  # one that was interrupted: its CPU seconds are not known
    options = ["SEED", args.seed, "OUTPUT_DIR", str(run), *(PLAIN if args.plain else ())]
    options += ["SOLVER.MAX_ITER", args.steps] if args.steps else []
    options += ["DATASETS.TRAIN", [sets["train"][0].partition("=")[2]]]
    setup_logging()
    began = time.process_time()
    model = dn.train(dn.load_config(str(CONFIG), [*options, "DATASETS.TEST", []]))
    seconds = time.process_time() - began
    results = dn.evaluate(dn.load_config(str(CONFIG), [*options, "DATASETS.TEST", sets["val"]]), model)
    peers.finish(args.out, results, seconds)


if __name__ == "__main__":
    main()
