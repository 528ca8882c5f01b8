"""Write REPRODUCTION.md from the folders in results/: claim, the paper's figure, ours, verdict.

`python -m iha_lab.report.reproduction` writes it; with `--check` it only exits with
status 1 where the file is out of date. A verdict follows from numbers by the rules at its top, and
from nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import iha
from iha_lab import baselines, paper
from iha_lab.baselines import InterleavedConfig
from iha_lab.experiments import configs, read
from iha_lab.experiments.siblings import command
from iha_lab.report.comparisons import (
    LONGEST,
    Compared,
    Experiment,
    chosen,
    corrected,
    price,
    probability,
)
from iha_lab.report.tables import ROOT, Table, generated
from iha_lab.stats import Mean

NOT_RUN = "not run"
MOST_ACCURATE = "IHA is the most accurate of those run"
LOWER_LOSS = "a decoder with IHA has a lower loss"

HEAD = """# Reproduction

What of arXiv 2602.21371 came out here, and what did not. Written by
`python -m iha_lab.report.reproduction` from the files in `results/`, each of which holds its
config, device and versions.

A comparison is *reproduced at this scale* if the 95 % interval of IHA minus each named baseline,
paired by seed, lies on IHA's side of zero; *not reproduced at this scale* if it lies on the other
side for one of them; else *undecided*: more seeds or a larger scale are needed. Where the paper
states no such result, the same rule says *holds* or *does not hold at this scale*. One training run
of each is always undecided. A small scale says nothing certain about the paper's.

Verdicts go by single intervals. Beside each difference stands p, of Student's paired test,
corrected by Holm for all {tests} differences on this page; — where all seeds agree. Costs are
parameters, forward FLOPs of a sequence, and seconds of a run on the machine that its record names.
"""


@dataclasses.dataclass(frozen=True)
class Claim:
    claim: str
    paper: str
    ours: str
    cost: str
    scale: str
    verdict: str
    command: str


def theorems(file: Path) -> list[Claim]:
    """Make a row for each theorem: how many of its checks hold, and which do not."""
    found: list[Claim] = []
    for name, rows in json.loads(file.read_text())["claims"].items():
        failed = [row for row in rows if row["verdict"] != "reproduced"]
        said = "reproduced" if not failed else "reproduced, but not as printed"
        said = "not reproduced" if len(failed) == len(rows) else said
        ours = f"{len(rows) - len(failed)} of {len(rows)} checks hold"
        if failed:
            ours += "; not: " + "; ".join(f"{row['claim']} ({row['setting']})" for row in failed)
        found.append(
            Claim(name, "proved", ours.replace("|", "\\|"), "", "exact", said, "`iha lab theory`")
        )
    return found


def verdict(differences: list[Mean | None]) -> str:
    """Judge by IHA minus each baseline."""
    known = [d for d in differences if d is not None and not math.isnan(d.half)]
    if any(d.mean + d.half < 0 for d in known):
        return "not reproduced at this scale"
    if not known or len(known) < len(differences):
        return "undecided (one seed)"
    won = all(d.mean - d.half > 0 for d in known)
    return "reproduced at this scale" if won else "undecided"


def comparison(one: Compared, ps: list[float | None]) -> Claim:
    """Make the row of one IHA against all baselines, with the corrected p of each difference."""
    rows, key = (one.row, *one.others), one.key
    minus = [
        f"minus {other.attention} {d.mean:+.3g} ± {d.half:.2g} (p {probability(p)})"
        for other, d, p in zip(one.others, one.differences, ps, strict=True)
        if d is not None
    ]
    means = ", ".join(f"{row.attention}{chosen(row)} {row.measures[key]}" for row in rows)
    higher = one.experiment.higher
    said = verdict([d if higher or d is None else d.negative() for d in one.differences])
    if one.in_the_paper.startswith("no"):  # the paper states no such result
        said = said.replace("not reproduced", "does not hold").replace("reproduced", "holds")
    return Claim(
        one.title,
        one.in_the_paper,
        f"{key}: {means}; {', '.join(minus)}",
        "; ".join(f"{row.attention} {price(row)}" for row in rows),
        f"`{one.experiment.folder}`, {one.row.measures[key].count} seeds",
        said,
        f"`{one.experiment.command}`",
    )


def compared(results: Path) -> list[Compared]:
    return [one for experiment in EXPERIMENTS for one in experiment.compared(results)]


EXPERIMENTS = (
    Experiment("composition", "small", MOST_ACCURATE, "accuracy"),
    Experiment("composition", "triples", MOST_ACCURATE, "accuracy"),
    Experiment("composition", "rivals", MOST_ACCURATE, "accuracy"),
    Experiment("composition", "paper", MOST_ACCURATE, "accuracy"),
    Experiment("retrieval", "small", MOST_ACCURATE, LONGEST),
    Experiment("retrieval", "smollm2", MOST_ACCURATE, LONGEST),
    Experiment("retrieval", "smollm2-flops", MOST_ACCURATE, LONGEST),
    Experiment("retrieval", "paper", MOST_ACCURATE, LONGEST),
    Experiment("lm", "small", LOWER_LOSS, "validation loss", higher=False),
    Experiment("lm", "paper", LOWER_LOSS, "validation loss", higher=False),
    Experiment("shift-bank", "small", MOST_ACCURATE, "accuracy", only="iha-p4"),
    Experiment("recall", "small", MOST_ACCURATE, "accuracy at 54 tokens"),
)


def exactness(folder: Path) -> list[Claim]:
    """Compare a model's and its upcycled sibling's answers: this project's own claim."""
    record = json.loads((folder / "result.json").read_text())
    alike = {row["job"]: _identical(row) for row in record["scores"]}
    ours = "; ".join(
        f"{job}: {same} of {of} answers identical" for job, (same, of) in alike.items()
    )
    exact = all(same == of for same, of in alike.values())
    return [
        Claim(
            "An upcycled model answers as before",
            "ours, not the paper's",
            ours,
            "",
            f"SmolLM2-135M-Instruct, P = 4, greedy (`{folder.name}`)",
            "holds" if exact else "does not hold",
            f"`iha upcycle smollm2 {record['models'][1]} -p 4`, `{asked(record, folder)}`",
        )
    ]


def asked(record: dict[str, Any], folder: Path) -> str:
    """Write the `iha eval` that gives a folder, from what its result says."""
    lengths = sorted({row["length"] for row in record["scores"]} - {None})
    tasks = dict.fromkeys(row["task"] for row in record["scores"])
    parts = ["iha eval", *record["models"], "--tasks", ",".join(tasks)]
    parts += ["--lengths", ",".join(map(str, lengths))] if lengths else ["--run-code"]
    parts += [
        "--limit",
        str(record["limit"]),
        "--batch-size",
        str(record["settings"]["batch_size"]),
    ]
    return " ".join([*parts, "-o", f"results/{folder.name}"])


def _identical(row: dict[str, Any]) -> tuple[int, int]:
    """Return (how many questions got the same answer from both, of how many)."""
    first, other = row["models"].values()
    return other["identical"] - max(first["failed"], other["failed"]), row["questions"]


def siblings(folder: Path) -> list[Claim]:
    """Compare siblings fine-tuned alike, with IHA and without: one run of each, so undecided."""
    training = json.loads((folder / "training.json").read_text())
    how = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in training.items())
    found: list[Claim] = []
    for row in json.loads((folder / "result.json").read_text())["scores"]:
        plain, mixed = row["models"].values()
        ours = f"plain {plain['value']:.1%}, IHA {mixed['value']:.1%} of {row['questions']}"
        if (interval := mixed["difference"]["interval"]) is not None:
            ours += "; difference {:+.1%} to {:+.1%} over questions".format(*interval)
        if training["prompts"] == "end in a space":
            ours += (
                f". Why: {silent(folder)} of IHA's answers are empty. Training prompts ended in a"
                " space, and RULER's do not; the row above is without that space"
            )
        found.append(
            Claim(
                f"{row['job']}: IHA is more accurate after equal fine-tuning",
                "2.4B model: +27 % at 4096 tokens",
                ours,
                "",
                f"SmolLM2-135M-Instruct, {how} (`{folder.name}`)",
                "undecided (one seed)",
                f"`{command(training)}`",
            )
        )
    return found


def silent(folder: Path) -> int:
    """Count the empty answers of the model of a folder that has more of them."""
    files = folder.glob("answers/*/*.jsonl")
    answers = ([json.loads(line)["text"] for line in f.read_text().splitlines()] for f in files)
    return max(sum(not text.strip() for text in texts) for texts in answers)


def matching() -> list[Claim]:
    """Count the FLOPs of the paper's model, on the meta device."""
    runs: list[Any] = read(configs("lm")["paper"]).runs()
    costs = {
        run.attention.label: baselines.cost(run.model(meta=True), run.sweep.seq_len) for run in runs
    }
    (run,) = [run for run in runs if isinstance(run.attention, InterleavedConfig)]
    sweep, attention = run.sweep, run.attention
    assert isinstance(attention, InterleavedConfig)
    plain, mixed = costs["mha"], costs[attention.label]
    P, N, H, d = (
        attention.pseudo_heads,
        sweep.seq_len,
        sweep.num_heads,
        sweep.hidden_size // sweep.num_heads,
    )
    schedule = iha.hybrid_schedule(sweep.num_layers, N, P)
    with_mixing = schedule.flops(H, d)
    mixing = len(schedule.layers) * 2 * N * d * P * 4 * H**2
    ratios = {
        "attention without mixing": (with_mixing - mixing) / plain.attention_flops,
        "attention with mixing": mixed.attention_flops / plain.attention_flops,
        "the whole model": mixed.total_flops / plain.total_flops,
    }
    return [
        Claim(
            f"The schedule matches FLOPs (appendix C): {what}",
            "equal up to constants, 3/5 without mixing",
            f"{ratio:.3f} of plain, causal halves counted on both sides",
            "",
            "`lm-paper`, counted",
            "matched within 5 %" if abs(ratio - 1) <= 0.05 else "not matched within 5 %",
            "`python -m iha_lab.report.reproduction`",
        )
        for what, ratio in ratios.items()
    ]


def not_run(results: Path) -> list[Claim]:
    """List what needs the paper's 2.4B model, and the experiments without a folder."""
    claims = [
        Claim(
            f"{column.title} ({title.partition(':')[0]})",
            f"IHA {column.values[0]:g}, global attention {column.values[1]:g}",
            "",
            "",
            "2.4B model",
            NOT_RUN,
            f"`iha eval MODEL … --suite paper --protocol {protocol}`",
        )
        for protocol, found in zip(("finetuned", "pretrained"), paper.TABLES, strict=True)
        for title, column in ((found.title, column) for column in found.columns)
    ]
    averages = ", ".join(f"{name} {value}" for name, value in paper.RULER_AVERAGE.items() if value)
    ruler = Claim(
        "RULER's average",
        averages,
        "",
        "",
        "2.4B model",
        NOT_RUN,
        "`iha eval MODEL … --suite ruler`",
    )
    waiting = [
        Claim(
            f"{one.kind}: {one.claim}",
            "; ".join(dict.fromkeys(run.in_the_paper() for run in one.runs)),
            "",
            "",
            f"`{one.folder}`, {len(one.runs)} runs",
            NOT_RUN,
            f"`{one.command}`",
        )
        for one in EXPERIMENTS
        if not (results / one.folder).exists()
    ]
    return [*waiting, ruler, *claims]


def written(results: Path = ROOT / "results") -> str:
    claims = theorems(results / "theory" / "theory.json")
    found = compared(results)
    ps = corrected(found)
    claims += [comparison(one, of) for one, of in zip(found, ps, strict=True)]
    claims += matching()
    for folder in sorted(results.glob("eval-exact-*")):
        claims += exactness(folder)
    for folder in sorted(results.glob("eval-siblings*")):
        claims += siblings(folder)
    columns = [field.name for field in dataclasses.fields(Claim)]
    rows = [list(dataclasses.astuple(claim)) for claim in claims + not_run(results)]
    head = HEAD.format(tests=sum(p is not None for of in ps for p in of))
    return f"{head}\n{Table(columns, rows).markdown()}\n"


def main() -> None:
    generated(ROOT / "REPRODUCTION.md", written(), "iha_lab.report.reproduction")


if __name__ == "__main__":
    main()
