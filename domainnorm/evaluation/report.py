"""The report of a run, where it is wanted and can be drawn."""

import importlib.util
import logging

from fvcore.common.config import CfgNode

from ..distributed import rank
from ..output import output_folder, replace_file
from .run_files import read_run

logger = logging.getLogger(__name__)


def write_report(cfg: CfgNode) -> None:
    """Write `OUTPUT_DIR/report.html` of what `evaluate` has left there. Rank 0 does it, the others go on.

    Also its figures, `OUTPUT_DIR/report/*.png`, and the best thresholds, `thresholds.json` beside the predictions.
    Nothing is written if `TEST.REPORT` is False or, with a warning, if matplotlib is not installed. No model is needed:
    curves, confusion matrix and worst images are of the predictions under the first statistics that were evaluated.

    Raises:
        UserError: a data set, or a file in `OUTPUT_DIR`, that cannot be read.
    """
    if rank() or not cfg.TEST.REPORT or not cfg.DATASETS.TEST:
        return
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("report.html is not written: matplotlib is not installed; pip install matplotlib, and evaluate")
        return
    from .report_page import report_page  # matplotlib takes a second to import

    run = read_run(output_folder(cfg.OUTPUT_DIR), cfg)
    page = report_page(run)
    with replace_file(run.folder / "report.html") as stream:
        stream.write(page)
    logger.info("report: %s", run.folder / "report.html")
