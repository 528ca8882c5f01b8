"""All claims in order: tables on the console, `theory.json` and figures in a folder."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import torch

from iha_lab.console import Console
from iha_lab.files import write_text
from iha_lab.machine import machine
from iha_lab.report.figures import save
from iha_lab.run_folder import claim
from iha_lab.theory import counting, filters, inclusion, plots, ranks, strictness
from iha_lab.theory.finding import COLUMNS

FILE = "theory.json"
ORDERS = range(1, 31)
EPSILONS = [10**-exponent for exponent in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)]


def run(output: Path, console: Console) -> Path:
    """Execute every claim; return the path of theory.json. A claim that fails is told, not raised.

    Everything is seeded and in float64. Raises ValueError where `output` holds something else.
    """
    with claim(output, {"command": "iha lab theory"}):
        return _run(output, console)


def _run(output: Path, console: Console) -> Path:
    start = time.perf_counter()
    counts = filters.parameter_counts(ORDERS)
    mha = ranks.ranks(None)
    iha = [ranks.ranks(ranks.random_mixing(P)) for P in ranks.PSEUDO_HEADS]
    claims = {
        "MHA ⊆ IHA": inclusion.findings(),
        "MHA ≠ IHA, on repeated tokens": strictness.findings(),
        "Polynomial filters": filters.findings(counts),
        "CPM-3": counting.findings(),
        "P² patterns a head": ranks.findings(mha, iha),
    }
    for number, (title, findings) in enumerate(claims.items(), 1):
        console.section(f"{number}. {title}")
        console.table(title, COLUMNS, [finding.row() for finding in findings])
        for finding in findings:
            if not finding.holds:
                text = f"{finding.verdict}: {finding.claim} ({finding.setting}). {finding.remark}"
                console.say(text.strip())
    save(plots.strictness(strictness.curves()), output / "strictness.png")
    save(plots.filters(counts, EPSILONS, filters.limit_errors(EPSILONS)), output / "filters.png")
    save(plots.patterns(mha, iha), output / "patterns.png")
    record = {
        **machine(torch.device("cpu")),
        "seconds": round(time.perf_counter() - start, 2),
        "claims": {title: [row.record() for row in rows] for title, rows in claims.items()},
    }
    file = output / FILE
    write_text(file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    holds = [finding.holds for finding in itertools.chain.from_iterable(claims.values())]
    console.say(f"{sum(holds)} of {len(holds)} rows reproduced; {file} has them all.")
    return file
