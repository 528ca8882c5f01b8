"""Write REPRODUCTION.md from the folders in results/: claim, the paper's figure, ours, verdict.

`python benchmarks/reproduction.py` writes it; with `--check` it only exits with status 1 where the file
is out of date. A verdict follows from numbers by the rules at its top, and from nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from iha.lab import paper
from iha.lab.experiments import report
from iha.lab.experiments.summary import Group, Interval, Row, summarize

ROOT = Path(__file__).parent.parent
NOT_RUN = "not run"

HEAD = """# Reproduction

What of arXiv 2602.21371 came out here, and what did not. Written by `benchmarks/reproduction.py` from the
files in `results/`, each of which holds its config, device and versions.

A comparison is *reproduced at this scale* if the 95 % interval of IHA minus each named rival, paired by
seed, lies above zero; *not reproduced at this scale* if it lies below zero for one of them; else
*undecided*: more seeds or a larger scale are needed. A small scale says nothing certain about the
paper's.
"""


@dataclasses.dataclass(frozen=True)
class Claim:
    claim: str
    paper: str
    ours: str
    scale: str
    verdict: str
    command: str


def table(claims: list[Claim]) -> str:
    fields = [field.name for field in dataclasses.fields(Claim)]
    rows = [fields, ["---"] * len(fields)]
    rows += [[getattr(claim, field) for field in fields] for claim in claims]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def theorems(file: Path) -> list[Claim]:
    """A row for each theorem: how many of its checks hold, and the largest error of those."""
    found: list[Claim] = []
    for name, rows in json.loads(file.read_text())["claims"].items():
        failed = [row for row in rows if row["verdict"] != "reproduced"]
        ours = f"{len(rows) - len(failed)} of {len(rows)} checks hold"
        if failed:
            ours += "; not: " + "; ".join(f"{row['claim']} ({row['setting']})" for row in failed)
        verdict = "reproduced" if not failed else "reproduced, but not as printed"
        found.append(
            Claim(name, "proved", ours.replace("|", "\\|"), "exact", verdict, "`iha lab theory`")
        )
    return found


def verdict(differences: list[Interval | None]) -> str:
    """From IHA minus each rival."""
    if not differences or any(d is None or math.isnan(d.half) for d in differences):
        return "undecided (one seed)"
    known = [d for d in differences if d is not None]
    if all(d.mean - d.half > 0 for d in known):
        return "reproduced at this scale"
    if any(d.mean + d.half < 0 for d in known):
        return "not reproduced at this scale"
    return "undecided"


def comparison(
    folder: Path,
    claim: Callable[[Group], tuple[str, str]],
    measure: Callable[[Row], str],
    rivals: tuple[str, ...],
    command: str,
    higher: bool = True,
) -> list[Claim]:
    """A row for each group of an experiment and each IHA in it."""
    runs = report.load(folder)
    found: list[Claim] = []
    for group in summarize(type(runs[0][0]), runs):
        rows = {row.attention: row for row in group.rows}
        against = [rows[name] for name in rivals if name in rows]
        for name, row in rows.items():
            if not name.startswith("iha"):
                continue
            what, theirs = claim(group)
            key = measure(row)
            differences = [row.minus(rival, key) for rival in against]
            signed = [d if higher or d is None else Interval(-d.mean, d.half, d.count) for d in differences]
            ours = f"{key}: {name} {row.measures[key]}"
            ours += "".join(f", {rival.attention} {rival.measures[key]}" for rival in against)
            ours += "".join(
                f"; minus {rival.attention}: {d.mean:+.4f} ± {d.half:.2g}"
                for rival, d in zip(against, differences, strict=True)
                if d is not None
            )
            seeds = row.measures[key].count
            scale = f"`{folder.name}`, {seeds} seeds"
            found.append(Claim(what, theirs, ours, scale, verdict(signed), command))
    return found


def composition(group: Group) -> tuple[str, str]:
    points = paper.COMPOSITION[group.title]
    return (
        f"{group.title}: IHA is the most accurate (appendix D)",
        f"up to +{points} points over 2-simplicial, the strongest rival",
    )


def written(results: Path = ROOT / "results") -> str:
    claims = theorems(results / "theory" / "theory.json")
    if (folder := results / "composition-small").exists():
        claims += comparison(
            folder,
            composition,
            lambda row: "accuracy",
            ("2-simplicial", "mha"),
            "`iha lab composition`",
        )
    return HEAD + "\n" + table(claims)


def main() -> None:
    path = ROOT / "REPRODUCTION.md"
    now = written()
    if sys.argv[1:] == ["--check"]:
        if not path.exists() or now != path.read_text():
            sys.exit("REPRODUCTION.md is out of date; run python benchmarks/reproduction.py.")
        return
    path.write_text(now)


if __name__ == "__main__":
    main()
