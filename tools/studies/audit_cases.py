#!/usr/bin/env python
"""Whether `dn.audit` names what is wrong, and is silent where nothing is: docs/audit.md's tables.

    tools/studies/audit_cases.py [--out docs/audit.md] [--faults WORD …] [--sound NAME …] [--real NAME …]

Each fault is planted in six variants of a small model, and each has a repaired twin. Thresholds were chosen on the
variants with even numbers; hits and false alarms are counted on the others, and on sound models of many families.
Then real cases: what torchvision, timm and this library do if they are used so. The tables are written between
markers in the page; half an hour on one core.
"""

import argparse
import re
import sys
import time
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import audit_real
import audit_sound
import audit_statistics
import audit_trainings
import torch
from audit_variants import Fault, Given

import domainnorm as dn
from domainnorm.auditing import Report, Thresholds

FAULTS: dict[str, Fault] = audit_statistics.FAULTS | audit_trainings.FAULTS
# with which every figure is a finding
ALL = {f.name: 1e-9 for f in fields(Thresholds)} | {"batch_samples": 1e9, "batch_elements": 1e9, "separate": 1e9}
LESS_IS_WORSE = ("batch_samples", "batch_elements", "separate")


def audited(given: Given, **options: Any) -> Report:
    """The report of one case."""
    return dn.audit(given.model, given.batches, progress=False, **given.options, **options)


def named(fault: Fault, report: Report, given: Given) -> tuple[bool, bool]:
    """Whether the fault is named, in the right layer, and whether it is so first."""
    places = [
        k
        for k, f in enumerate(report.findings)
        if (f.check, f.kind) == (fault.check, fault.kind) and (not given.layers or f.layers[0] in given.layers)
    ]
    return bool(places), bool(places) and places[0] == 0


@dataclass
class Count:
    """Of one fault."""

    cases: int = 0
    hits: int = 0
    first: int = 0
    alarms: int = 0


def count(fault: Fault, numbers: range) -> Count:
    """Hits of planted faults and findings of any kind about their twins."""
    counts = Count()
    for k in numbers:
        given = fault.given(k, True)
        found, first = named(fault, audited(given), given)
        counts.cases += 1
        counts.hits += found
        counts.first += first
        counts.alarms += bool(audited(fault.given(k, False)).findings)
    return counts


def figure(fault: Fault, k: int, planted: bool) -> float | None:
    """What is compared with the threshold; None: there is no such figure at all."""
    report = audited(fault.given(k, planted), thresholds=ALL, checks=[fault.check])
    values = [f.value for f in report.findings if f.kind == fault.kind]
    return values[0] if values else None
