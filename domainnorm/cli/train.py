"""Train or evaluate the model of a config.

    domainnorm train --config-file F [--num-gpus N] [--resume] [--eval-only] KEY VALUE …

It also runs under torchrun (`torchrun … tools/train_net.py …`), or with --num-machines on each of several machines.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from fvcore.common.config import CfgNode

from ..config import load_config
from ..distributed import get_device, launch
from ..engine import train
from ..engine.checkpoint import last_checkpoint, other_choices
from ..engine.environment import describe_run
from ..engine.folder import RunFolder
from ..engine.log import logged_end, setup_logging
from ..engine.stop import StopSignals
from ..engine.streams import tolerant_streams
from ..errors import UserError
from ..evaluation import evaluate, write_report
from ..modeling import build_model
from . import Parser

logger = logging.getLogger(__name__)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """detectron2's arguments; KEY VALUE pairs may stand before, between or after them."""
    parser = Parser(description="Train or evaluate the model of a config.", allow_abbrev=False)
    parser.add_argument("--config-file", metavar="FILE", required=True, help="a YAML file, or its name in configs/")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS or, with --resume, the last checkpoint"
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="number of processes on this machine, also on CPU")
    parser.add_argument("--num-machines", type=int, default=1, help="each starts the same command")
    parser.add_argument("--machine-rank", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0, if there are several")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config options, which override those of FILE")
    args = parser.parse_intermixed_args(argv)
    if args.num_gpus < 1:
        parser.error(f"--num-gpus takes 1 or more, got {args.num_gpus}")
    if not 0 <= args.machine_rank < args.num_machines:
        parser.error(f"--machine-rank takes 0 to {args.num_machines - 1}, got {args.machine_rank}")
    return args


def evaluate_only(cfg: CfgNode, resume: bool) -> None:
    """Evaluate the last checkpoint of `OUTPUT_DIR` or, without `resume`, `MODEL.WEIGHTS`."""
    file = last_checkpoint(cfg.OUTPUT_DIR) if resume else None
    if resume and file is None:
        raise UserError(f"--eval-only --resume: OUTPUT_DIR {cfg.OUTPUT_DIR} holds no checkpoint")
    if not resume and not cfg.MODEL.WEIGHTS:
        raise UserError("--eval-only: MODEL.WEIGHTS is empty; give a checkpoint file, or --resume for the last one")
    if not cfg.DATASETS.TEST:
        raise UserError("--eval-only: DATASETS.TEST is empty; name a data set to evaluate on")
    with tolerant_streams(), logged_end(), RunFolder(cfg.OUTPUT_DIR) as folder, StopSignals():
        setup_logging()
        folder.claim(new=False)
        weights = str(file or cfg.MODEL.WEIGHTS)
        model = build_model(_with_weights(cfg, weights), trained=True)
        setup_logging(folder.open())
        for line in describe_run(cfg, get_device(cfg.MODEL.DEVICE), weights):
            logger.info("%s", line)
        if others := other_choices(cfg, weights):
            logger.warning("%s", others)
        evaluate(cfg, model)
        write_report(cfg)


def _with_weights(cfg: CfgNode, weights: str) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = weights
    cfg.freeze()
    return cfg


def run(cfg: CfgNode, resume: bool, eval_only: bool) -> None:
    """The work of one rank."""
    if eval_only:
        evaluate_only(cfg, resume)
    else:
        train(cfg, resume=resume)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 after a mistake in what the user gave, 130 and 143 after Ctrl-C and SIGTERM."""
    try:
        args = parse(argv)
        cfg = load_config(args.config_file, args.opts)
        launch(
            run,
            (cfg, args.resume, args.eval_only),
            device=cfg.MODEL.DEVICE,
            num_processes=args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
        )
    except UserError as error:
        with tolerant_streams():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:  # before there is anything to save
        return 130
    return 0
