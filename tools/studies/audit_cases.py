#!/usr/bin/env python
"""Check that `dn.audit` names faults, and is silent where there are none: the tables of docs/audit.md.

    tools/studies/audit_cases.py [--page docs/audit.md] [--faults WORD …] [--sound NAME …] [--real WORD …]

Each fault is planted in six variants of a small model (strength, architecture, width, batch), each of which has a
repaired twin. Their figures, and those of all other sound models, give the range for the thresholds. Hits and false
alarms are counted on fresh variants with other seeds and batches, on which nothing was chosen. Then come sound models
of many families, and real cases: what torchvision, and this library, do if used that way. The results are written into
the page between markers; this takes an hour on one core.
"""

import argparse
import dataclasses
import re
import time
import warnings
from pathlib import Path
from typing import Any

import audit_real
import audit_statistics
import audit_trainings
import torch
from audit_variants import Fault, Given, Variant

import domainnorm as dn
from domainnorm.auditing import Report, Thresholds

FAULTS: dict[str, Fault] = audit_statistics.FAULTS | audit_trainings.FAULTS
LESS_IS_WORSE = ("batch_samples", "batch_elements", "separate")
VARIANTS = 6  # of each fault
SHOWN = 2  # findings of a real case
PAGE = Path(__file__).parents[2] / "docs" / "audit.md"


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


def figure(given: Given, threshold: str, kind: str) -> float:
    """What is compared with a threshold: the value of the finding that there is if it is as low as can be; or 0."""
    lowest = 1e9 if threshold in LESS_IS_WORSE else 1e-6
    report = audited(given, thresholds={threshold: lowest})
    found = [f for f in report.findings if f.kind == kind]
    if not found:
        return 0.0
    away = found[0].details.get("distance")  # of calls, both figures have to be as large
    return min(found[0].value, max(away.values())) if away else found[0].value


def rows_of_faults(faults: dict[str, Fault]) -> tuple[list[list[str]], dict[str, tuple[list[float], list[float]]]]:
    """The table of hits and false alarms; and of each threshold, the figures of healthy and of faulty cases."""
    rows, figures = [], {}
    total = [0] * 4
    for name, fault in faults.items():
        counts = [0] * 4
        for k in range(VARIANTS):
            if fault.threshold:
                healthy, faulty = figures.setdefault(fault.threshold, ([], []))
                healthy.append(figure(fault.given(Variant(k), False), fault.threshold, fault.kind))
                faulty.append(figure(fault.given(Variant(k), True), fault.threshold, fault.kind))
            fresh = Variant(k, fresh=True)
            planted, twin = fault.given(fresh, True), fault.given(fresh, False)
            found, first = named(fault, audited(planted), planted)
            alarm = audited(twin).findings
            for n, value in enumerate((True, found, first, bool(alarm))):
                counts[n] += value
            print(
                f"{name}, {k}: {'named' if found else 'MISSED'}{' first' if first else ''}, twin: "
                f"{[(f.check, f.kind) for f in alarm] or 'silent'}",
                flush=True,
            )
        total = [a + b for a, b in zip(total, counts, strict=True)]
        cases, hits, firsts, alarms = counts
        rows.append([name, f"{fault.check}: {fault.kind}", f"{hits} of {cases}", f"{firsts}", f"{alarms} of {cases}"])
    cases, hits, firsts, alarms = total
    rows.append(["**all**", "", f"**{hits} of {cases}**", f"**{firsts}**", f"**{alarms} of {cases}**"])
    return rows, figures


KINDS = {f.threshold: f.kind for f in FAULTS.values() if f.threshold}


def rows_of_sound(names: list[str], figures: dict[str, tuple[list[float], list[float]]]) -> list[list[str]]:
    """The table of sound models; adds the figures of every other one."""
    import audit_sound

    rows = []
    for k, name in enumerate(names):
        given = audit_sound.sound(name)
        report = audited(given)
        found = ", ".join(f"{f.check}: {f.kind}" for f in report.findings) or "none"
        print(f"{name}: {found}", flush=True)
        norms = str(report.norms) if report.norms else "0, nothing to audit"
        rows.append([name, norms, str(len(given.batches[0])), f"{100 * report.output_change:.0f}%", found])
        if k % 2 == 0:
            for threshold, (healthy, _) in figures.items():
                if threshold not in LESS_IS_WORSE:
                    healthy.append(figure(given, threshold, KINDS[threshold]))
    return rows


def rows_of_thresholds(figures: dict[str, tuple[list[float], list[float]]]) -> list[list[str]]:
    """Between what each lies."""
    rows, defaults = [], dataclasses.asdict(Thresholds())
    for threshold, (healthy, faulty) in figures.items():
        less = threshold in LESS_IS_WORSE
        near, far = (min(healthy), max(faulty)) if less else (max(healthy), min(faulty))
        rows.append([f"`{threshold}`", f"{defaults[threshold]:g}", f"{near:.2g}", f"{far:.2g}", str(len(healthy))])
    return rows


def real_cases(names: list[str]) -> str:
    """A section for each."""
    parts = []
    for name in names:
        torch.manual_seed(0)
        build = audit_real.REAL[name]
        given = build()
        began = time.perf_counter()
        report = audited(given)
        seconds = time.perf_counter() - began
        print(f"{name}: {[(f.level, f.check, f.kind) for f in report.findings]}", flush=True)
        title = name[0].upper() + name[1:]
        said = " ".join((build.__doc__ or "").split())
        parts.append(f"### {title}\n\n{said} Audited in {seconds:.0f} s:\n\n```\n" + beginning(report) + "\n```\n")
    return "\n".join(parts)


def beginning(report: Report) -> str:
    """Its first line and its first findings, as it is printed."""
    blocks = re.split(r"\n\s*\n|\n(?=(?:error|warning|note): )", str(report))
    found = [block for block in blocks[1:] if block.startswith(("error: ", "warning: ", "note: "))]
    return "\n".join([blocks[0], "", *found[:SHOWN], *(["…"] if len(found) > SHOWN else [])])


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def write(page: Path, section: str, text: str) -> None:
    """Replace what stands between the markers of a section."""
    before = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {section}: written by tools/studies/audit_cases.py -->", f"<!-- end of {section} -->"
    if begin not in before or end not in before:
        raise SystemExit(f"{page} has no markers {begin!r} and {end!r}: put them where the table belongs")
    head, rest = before.split(begin)
    page.write_text(f"{head}{begin}\n\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    import audit_sound  # needs timm

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGE)
    for option, names in (("faults", FAULTS), ("sound", audit_sound.SOUND), ("real", audit_real.REAL)):
        parser.add_argument(
            f"--{option}", nargs="*", metavar="WORD", help=f"those with the word in their name, of {list(names)}"
        )
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    everything = args.faults is None and args.sound is None and args.real is None
    chosen = {
        option: [name for name in names if everything or any(word in name for word in words or [])]
        for option, names, words in (
            ("faults", FAULTS, args.faults),
            ("sound", audit_sound.SOUND, args.sound),
            ("real", audit_real.REAL, args.real),
        )
    }
    figures: dict[str, tuple[list[float], list[float]]] = {}
    if chosen["faults"]:
        rows, figures = rows_of_faults({name: FAULTS[name] for name in chosen["faults"]})
        write(
            args.page, "faults", table(["planted fault", "has to be named", "named", "first", "twin not silent"], rows)
        )
    if chosen["sound"]:
        rows = rows_of_sound(chosen["sound"], figures)
        write(args.page, "sound models", table(["model", "norms", "batch", "output changes by", "findings"], rows))
    if figures:
        head = ["threshold", "default", "worst healthy", "mildest fault", "healthy cases"]
        write(args.page, "thresholds", table(head, rows_of_thresholds(figures)))
    if chosen["real"]:
        write(args.page, "real cases", real_cases(chosen["real"]))


if __name__ == "__main__":
    main()
