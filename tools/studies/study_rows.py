"""The studies that run.py knows."""

import rows_classifiers
import rows_detectors
from study import Study

STUDIES: dict[str, Study] = rows_detectors.STUDIES | rows_classifiers.STUDIES
