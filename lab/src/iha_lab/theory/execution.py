"""All claims in order: tables on the console, `theory.json` and pictures in a folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from iha_lab.files import write_text
from iha_lab.machine import machine
from iha_lab.theory import counting, filters, inclusion, patterns, pictures, strictness
from iha_lab.theory.finding import COLUMNS, Finding

if TYPE_CHECKING:
    from iha_lab.console import Console

FILE = "theory.json"
ORDERS = range(1, 31)
EPSILONS = [10**-exponent for exponent in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)]


def run(output: Path, console: Console) -> Path:
    """Execute every claim; return the path of theory.json. A claim that fails is told, not raised.

    Everything is seeded and in float64.
    """
    start = time.perf_counter()
    counts = filters.parameter_counts(ORDERS)
    mha = patterns.ranks(None)
    iha = [patterns.ranks(patterns.random_mixing(P)) for P in patterns.PSEUDO_HEADS]
    claims = {
        "MHA ⊆ IHA": inclusion.findings(),
        "MHA ≠ IHA, on repeated tokens": strictness.findings(),
        "Polynomial filters": filters.findings(counts),
        "CPM-3": counting.findings(),
        "P² patterns a head": patterns.findings(mha, iha),
    }
    for number, (title, findings) in enumerate(claims.items(), 1):
        console.section(f"{number}. {title}")
        console.table(title, COLUMNS, [finding.row() for finding in findings])
        for finding in findings:
            if not finding.holds:
                text = f"{finding.verdict}: {finding.claim} ({finding.setting}). {finding.remark}"
                console.say(text.strip())
    errors = filters.limit_errors(EPSILONS)
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in {
        "strictness": pictures.strictness(strictness.curves()),
        "filters": pictures.filters(counts, EPSILONS, errors),
        "patterns": pictures.patterns(mha, iha),
    }.items():
        figure.savefig(output / f"{name}.png", dpi=130)
    every = [finding for findings in claims.values() for finding in findings]
    record = {
        **machine(torch.device("cpu")),
        "seconds": round(time.perf_counter() - start, 2),
        "claims": {
            title: [finding.record() for finding in findings] for title, findings in claims.items()
        },
    }
    file = output / FILE
    write_text(file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    console.say(f"{_held(every)} of {len(every)} rows reproduced; {file} has them all.")
    return file


def _held(findings: list[Finding]) -> int:
    return sum(finding.holds for finding in findings)
