"""Write docs/evidence.md and its pictures from results/: should one use IHA?

`python -m iha_lab.report.evidence` writes them; with `--check` it only exits with status 1 where
the page is out of date. A word about a comparison follows from its interval, and from nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iha_lab.experiments import load
from iha_lab.experiments.records import Record
from iha_lab.experiments.summary import Finished, Row, best, summarize
from iha_lab.report import figures, pages
from iha_lab.report.comparisons import Compared, corrected, probability
from iha_lab.report.reproduction import EXPERIMENTS, compared, silent
from iha_lab.report.tables import ROOT, Table, generated
from iha_lab.stats import Mean

PAGE, PICTURES = ROOT / "docs" / "evidence.md", ROOT / "docs" / "images"
BANK, LONG = "shift-bank-small", "shift-bank-long"
SHOWN = ("iha-p4", "iha-p4-frozen", "iha-p4-q2", "paired-heads", "mha", "mha-h16", "mha-h16-d16")
STEPS, SECONDS = "validation accuracy over steps", "CPU seconds over steps"
SPENT = "training CPU seconds"


def word(difference: Mean | None, p: float | None, higher: bool) -> str:
    """Say what an interval says of IHA, and whether that outlives the correction."""
    if difference is None or not difference.half >= 0:
        return "one run, says little"
    gain = difference if higher else difference.negative()
    if gain.mean - gain.half <= 0 <= gain.mean + gain.half:
        return "not told apart"
    side = "better" if gain.mean > 0 else "worse"
    return side if p is not None and p < 0.05 else f"{side}, before the correction"


def overview(found: list[Compared], ps: list[list[float | None]]) -> str:
    """Tabulate IHA against each baseline: difference, p, price."""
    rows: list[list[str]] = []
    for one, of in zip(found, ps, strict=True):
        for other, d, p in zip(one.others, one.differences, of, strict=True):
            assert d is not None
            mine, theirs = one.row, other
            rows.append(
                [
                    f"`{one.experiment.folder}`: {one.key}",
                    f"{mine.attention} minus {theirs.attention}",
                    f"{d.mean:+.3g} ± {d.half:.2g} ({d.count} seeds)",
                    probability(p),
                    word(d, p, one.experiment.higher),
                    f"{mine.cost['parameters'] / theirs.cost['parameters']:.3f}",
                    f"{mine.cost['total_flops'] / theirs.cost['total_flops']:.2f}",
                    f"{seconds(mine) / seconds(theirs):.2f}",
                ]
            )
    columns = ["task: measure", "what", "difference, 95 %", "p (Holm)", "IHA is"]
    columns += ["parameters, ×", "FLOPs, ×", "seconds, ×"]
    return Table(columns, rows).markdown()


def seconds(row: Row) -> float:
    """Processor seconds of training where they were recorded, else the clock's of a run."""
    return row.measures[SPENT].mean if SPENT in row.measures else row.seconds


def bank(rows: list[Row]) -> str:
    """Tabulate the shift bank, the most accurate first."""
    order = sorted(rows, key=lambda row: -row.measures["accuracy"].mean)
    cells = [
        [
            row.attention,
            "".join(f"{rate:g}" for rate in row.selected.values()),
            f"{row.measures['accuracy']}",
            ", ".join(f"{n:.0f}" for n in row.by_seed["offsets solved"].values()),
            f"{row.cost['parameters']:,}",
            f"{row.cost['total_flops'] / 1e6:.2f}",
            f"{row.measures[SPENT].mean:.0f}",
        ]
        for row in order
    ]
    columns = ["attention", "rate", "accuracy, 95 %", "offsets solved of 16, by seed", "parameters"]
    return Table([*columns, "MFLOPs of a sequence", "CPU seconds"], cells).markdown()


def equal(
    rows: list[Row], what: str, spent: Callable[[Row, float], float], of: tuple[str, ...]
) -> str:
    """Tabulate the accuracies when a run has spent what a whole run of an attention in `of` spends.

    It is the last measured step within that budget; empty where a run has spent less in all.
    """
    whole = {row.attention: spent(row, row.curves[STEPS][-1][0]) for row in rows}
    cells: list[list[str]] = []
    for row in rows:
        line = [row.attention]
        for name in of:
            inside = [mean for step, mean in row.curves[STEPS] if spent(row, step) <= whole[name]]
            ended = whole[row.attention] < 0.9 * whole[name]
            line.append("" if ended or not inside else f"{inside[-1].mean:.3f}")
        cells.append(line)
    heads = [f"{whole[name]:.3g} {what}, {name}'s run" for name in of]
    return Table(["accuracy after", *heads], cells).markdown()


def variants(rows: list[Row]) -> str:
    """Tabulate the paper's IHA minus each variant of it."""
    (mixed,) = (row for row in rows if row.attention == "iha-p4")
    cells: list[list[str]] = []
    for row in rows:
        d = mixed.minus(row, "accuracy")
        if row is mixed or d is None or not row.attention.startswith("iha"):
            continue
        minus = f"{d.mean:+.4f} ± {d.half:.2g} ({d.count})"
        share = f"{seconds(row) / seconds(mixed):.2f}"
        cells.append([row.attention, minus, word(d, None, True), share])
    columns = ["variant", "iha-p4 minus it, accuracy, 95 % (seeds)", "iha-p4 is", "its seconds, ×"]
    return Table(columns, cells).markdown()


def cpu_seconds(row: Row, step: float) -> float:
    return dict(row.curves[SECONDS])[step].mean


def tuning(finished: list[Finished]) -> str:
    """Tabulate what the tuning seed saw at each rate, and which rate it chose."""
    runs: dict[str, list[Finished]] = {}
    for run, record in finished:
        if run.seed in run.sweep.tuning_seeds:
            runs.setdefault(run.attention.label, []).append((run, record))
    rates = sorted({run.on("learning_rates") for of in runs.values() for run, _ in of})
    cells: list[list[str]] = []
    for attention, of in runs.items():
        seen = {run.on("learning_rates"): accuracy(record) for run, record in of}
        chosen = best(of)
        texts = [f"{seen[rate]:.3f}" if rate in seen else "" for rate in rates]
        texts = [f"**{t}**" if rate == chosen else t for rate, t in zip(rates, texts, strict=True)]
        cells.append([attention, *texts])
    return Table(["validation accuracy, at rate", *(f"{r:g}" for r in rates)], cells).markdown()


def accuracy(record: Record) -> float:
    return record.result.measures["validation accuracy"]


def siblings(folder: Path) -> str:
    """Say in one line what fine-tuned siblings answered; one training run of each."""
    (row,) = json.loads((folder / "result.json").read_text())["scores"]
    training = json.loads((folder / "training.json").read_text())
    plain, mixed = row["models"].values()
    low, high = mixed["difference"]["interval"]
    line = (
        f"- SmolLM2-135M fine-tuned for {training['steps']} steps (training prompts"
        f" {training['prompts']}), {row['questions']} questions of {row['job']}: plain"
        f" {plain['value']:.1%}, IHA {mixed['value']:.1%}, difference {low:+.1%} to {high:+.1%}"
        " over questions; one run of each."
    )
    if training["prompts"] == "end in a space":
        line += (
            f" {silent(folder)} of IHA's answers are empty: it had learned to answer after a space,"
            " which RULER's prompts do not end in."
        )
    return line


def exact(folder: Path) -> str:
    scores = json.loads((folder / "result.json").read_text())["scores"]
    same = sum(list(row["models"].values())[1]["identical"] for row in scores)
    return f"{same} of {sum(row['questions'] for row in scores)}"


def heads_picture(rows: list[Row]) -> Any:
    """Draw offsets solved against heads: plain attention as a line, all else at its H."""
    figure, ((axis,),) = figures.panels(1, 1, 6, 3.4)
    counts = {row.attention: list(row.by_seed["offsets solved"].values()) for row in rows}
    plain = {4 if name == "mha" else int(name[5:]): name for name in counts if _by_width(name)}
    xs = sorted(plain)
    means = [sum(counts[plain[x]]) / len(counts[plain[x]]) for x in xs]
    axis.plot(xs, means, color=figures.COLOURS["mha"], marker="o", label="mha")
    for x in xs:
        axis.plot([x] * len(counts[plain[x]]), counts[plain[x]], "o", mfc="none", mec="#0072b2")
    others = [name for name in counts if name not in plain.values()]
    looks = figures.looks(others)
    for i, name in enumerate(others):
        x = 16 if name.startswith("mha-h16") else 4
        x *= 1.06 ** (i - len(others) / 2)  # side by side, on a scale of logarithms
        seeds, look = counts[name], looks[name] | {"linestyle": ""}
        axis.plot([x] * len(seeds), seeds, mfc="none", **look)
        axis.plot(x, sum(seeds) / len(seeds), label=name, **look)
    axis.set_xscale("log", base=2)
    axis.set_xticks(xs, [str(x) for x in xs])
    axis.set_xlabel("heads H (width 64); variants of H = 4 side by side; filled: mean, open: seeds")
    axis.set_ylabel("offsets solved, of 16")
    axis.legend(frameon=False, fontsize=7, bbox_to_anchor=(1, 1), loc="upper left")
    return figure


def _by_width(name: str) -> bool:
    """Whether it is plain attention whose heads share the width."""
    return name == "mha" or (name.startswith("mha-h") and name[5:].isdigit())


def time_picture(rows: list[Row]) -> Any:
    """Draw accuracy over the processor seconds of training."""
    lines = {
        row.attention: [(cpu_seconds(row, step), mean) for step, mean in row.curves[STEPS]]
        for row in rows
    }
    return figures.curves(lines, "processor seconds of training", "validation accuracy")


def differences_picture(found: list[Compared]) -> Any:
    """Draw IHA minus each baseline with its interval: a panel for each experiment."""
    figure, axes = figures.panels(1, len(found), 3.1 * len(found), 3.2)
    for axis, one in zip(axes[0], found, strict=True):
        names = [other.attention for other in one.others]
        for name, d, look in zip(
            names, one.differences, figures.looks(names).values(), strict=True
        ):
            assert d is not None
            axis.errorbar(
                d.mean, name, xerr=d.half, fmt=look["marker"], color=look["color"], capsize=3
            )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_ylim(len(names) - 0.5, -0.5)
        better = "right" if one.experiment.higher else "left"
        axis.set_title(f"{one.experiment.folder}\n{one.row.attention} minus …", fontsize=9)
        axis.set_xlabel(f"{one.key}\n(IHA is better to the {better})")
    return figure


def short(found: list[Compared], ps: list[list[float | None]]) -> str:
    """List the comparisons by what their intervals say."""
    said: dict[str, list[str]] = {}
    for one, of in zip(found, ps, strict=True):
        by_word: dict[str, list[str]] = {}
        for other, d, p in zip(one.others, one.differences, of, strict=True):
            by_word.setdefault(word(d, p, one.experiment.higher), []).append(other.attention)
        for what, others in by_word.items():
            line = f"`{one.experiment.folder}` ({one.key}): {one.row.attention} against"
            said.setdefault(what, []).append(f"{line} {', '.join(others)}")
    return "\n".join(f"- **IHA {what}**: {'; '.join(of)}." for what, of in sorted(said.items()))


def written(results: Path = ROOT / "results") -> str:
    found = compared(results)
    ps = corrected(found)
    finished = load(results / BANK)
    (comparison,) = summarize(finished)
    rows = sorted(comparison.rows, key=lambda row: -row.measures["accuracy"].mean)
    sweep: Any = finished[0][0].sweep

    def gflops(row: Row, step: float) -> float:  # backward takes twice forward's
        return 3 * sweep.batch_size * row.cost["total_flops"] * step / 1e9

    return pages.render(
        "report/evidence.md.jinja",
        tests=sum(p is not None for of in ps for p in of),
        short=short(found, ps),
        overview=overview(found, ps),
        sweep=sweep,
        rates=sorted({run.on("learning_rates") for run, _ in finished}),
        bank=bank(rows),
        variants=variants(rows),
        at_equal_time=equal(rows, "CPU seconds", cpu_seconds, ("mha", "mha-h16", "iha-p4")),
        at_equal_flops=equal(rows, "training GFLOPs", gflops, ("mha-h16", "iha-p4")),
        longer=longer(results, rows),
        tuning=tuning(finished),
        siblings=[siblings(folder) for folder in sorted(results.glob("eval-siblings*"))],
        exact_code=exact(results / "eval-exact-code"),
        exact_ruler=exact(results / "eval-exact-ruler"),
        not_run=[one for one in EXPERIMENTS if not (results / one.folder).exists()],
    )


def longer(results: Path, rows: list[Row]) -> str:
    """Tell of plain attention that ran for as many FLOPs as IHA."""
    if not (results / LONG).exists():
        return "Plain attention for as many FLOPs as IHA's whole run: not run."
    (comparison,) = summarize(load(results / LONG))
    (plain,) = comparison.rows
    mixed = next(row for row in rows if row.attention == "iha-p4")
    d = mixed.minus(plain, "accuracy")
    solved = ", ".join(f"{n:.0f}" for n in plain.by_seed["offsets solved"].values())
    return (
        f"**{plain.attention} for the FLOPs of {mixed.attention}**"
        f" ({plain.curves[STEPS][-1][0]:.0f} steps, one longer cycle,"
        f" {plain.measures[SPENT].mean:.0f} CPU seconds): accuracy"
        f" {plain.measures['accuracy']}, offsets solved {solved}; {mixed.attention} minus it {d}."
    )


def main() -> None:
    generated(PAGE, written(), "iha_lab.report.evidence")
    if sys.argv[1:] == ["--check"]:
        return
    results = ROOT / "results"
    (comparison,) = summarize(load(results / BANK))
    rows = comparison.rows
    shown = [row for row in rows if row.attention in SHOWN]
    for name, picture in {
        "differences": differences_picture(compared(results)),
        "heads": heads_picture(rows),
        "time": time_picture(shown),
    }.items():
        figures.save(picture, PICTURES / f"evidence-{name}.png")


if __name__ == "__main__":
    main()
