"""Tables for the terminal, and report.html: one self-contained page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from iha_lab import paper
from iha_lab.report import figures, pages

Result = dict[str, Any]  # what run.summary gives
STROKES = ("-", "--", ":", "-.")
COLOURS = ("#4878a8", "#d1605e", "#6aa56e", "#8a6fae", "#c48f3c", "#6b7280")
MULTI_KEY = ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3")
AVERAGE = "average of these tasks"


def percent(cell: Result) -> str:
    """A mean with its interval, in percent."""
    return f"{100 * cell['value']:.1f}{_interval(cell['interval'], '.1f')}"


def signed(cell: Result) -> str:
    """A difference with its interval, in percentage points."""
    if cell["interval"] is None:  # the same difference at each question
        return f"{100 * cell['value']:+.1f}" if cell["value"] else "no question scored otherwise"
    return f"{100 * cell['value']:+.1f}{_interval(cell['interval'], '+.1f')}"


def _interval(interval: Sequence[float] | None, form: str) -> str:
    if interval is None:
        return ""
    low, high = (format(100 * end, form) for end in interval)
    return f" ({low} to {high})"


def short(result: Result) -> dict[str, str]:
    """The last part of each model's name, if that tells them apart."""
    names = {name: Path(name).name or name for name in result["models"]}
    return names if len(set(names.values())) == len(names) else {name: name for name in names}


def lines(cell: Result, questions: int) -> list[str]:
    """What a table says of one model and score."""
    found = [percent(cell)]
    if "difference" in cell:
        found.append(signed(cell["difference"]))
        found.append(f"identical answers: {cell['identical']} of {questions}")
    if cell["failed"]:
        found.append(f"failed: {cell['failed']} of {questions}")
    return found


CAPTION = (
    "In percent, with 95 % intervals: Wilson's where each question scores 0 or 1, else the"
    " bootstrap over questions. Below: the difference to the first model in points, with the paired"
    " bootstrap's interval (10 000 resamples, fixed seed), and how many questions got the very same"
    " answers."
)


def table(result: Result) -> Table:
    """All scores, for the terminal."""
    names = short(result)
    found = Table(show_lines=len(names) > 1)
    for column in ("task", "score", "questions"):
        found.add_column(column)
    for name in result["models"]:
        found.add_column(names[name], justify="right")
    for line in result["scores"]:
        cells = [line["job"], line["score"], str(line["questions"])]
        for name in result["models"]:
            cell = line["models"].get(name)
            cells.append("" if cell is None else "\n".join(lines(cell, line["questions"])))
        found.add_row(*cells)
    if result["average_rank"]:
        ranks = [f"{result['average_rank'][name]:.2f}" for name in result["models"]]
        found.add_row("average rank", "", f"{result['ranked_scores']} scores", *ranks)
    return found


def write(result: Result, folder: Path) -> Path:
    """`report.html` in that folder."""
    return pages.write(
        folder / "report.html",
        "eval/report.html.jinja",
        result=result,
        names=short(result),
        lines=lines,
        caption=CAPTION,
        pictures=_pictures(result),
        paper=paper,
        ours=lambda name, column: _ours(result, name, column),
        gains=_multi_key_gains(result),
        averages=_ruler_averages(result),
    )


def _ours(result: Result, name: str, column: paper.Column) -> str:
    """Our score of the same kind as one of the paper's."""
    for line in result["scores"]:
        if (line["job"], line["score"]) == column.ours and name in line["models"]:
            return percent(line["models"][name])
    return "–"


def _by_length(result: Result, tasks: Sequence[str] | None = None) -> dict[str, dict[int, float]]:
    """Mean over RULER tasks, for each model and length at which all have been run."""
    found: dict[str, dict[int, float]] = {}
    ruler = [line for line in result["scores"] if line["length"] is not None]
    chosen = [line for line in ruler if tasks is None or line["task"] in tasks]
    lengths = sorted({line["length"] for line in chosen})
    for name in result["models"]:
        for length in lengths:
            here = [line["models"].get(name) for line in chosen if line["length"] == length]
            if all(here):
                found.setdefault(name, {})[length] = statistics.fmean(c["value"] for c in here)
    return found


def _ruler_averages(result: Result) -> dict[str, float]:
    return {name: statistics.fmean(of.values()) for name, of in _by_length(result).items()}


def _multi_key_gains(result: Result) -> dict[int, dict[str, float | None]]:
    """Relative gain over the first model in multi-key retrieval, by length; None over zero."""
    means = _by_length(result, MULTI_KEY)
    first = means.get(result["models"][0], {})
    gains: dict[int, dict[str, float | None]] = {}
    for name in result["models"][1:]:
        for length, value in means.get(name, {}).items():
            base = first.get(length)
            gains.setdefault(length, {})[name] = value / base - 1 if base else None
    return gains


def _pictures(result: Result) -> list[dict[str, str]]:
    pictures: list[dict[str, str]] = []
    with matplotlib.rc_context(figures.STYLE):
        if any(line["length"] is not None for line in result["scores"]):
            pictures.append(
                {
                    "title": "RULER over length",
                    "caption": "Ours. Bars are 95 % intervals of single scores.",
                    "uri": figures.data_uri(_curves(result)),
                }
            )
        if any(line["length"] is None for line in result["scores"]):
            pictures.append(
                {
                    "title": "Mathematics and code",
                    "caption": "Ours, with 95 % intervals.",
                    "uri": figures.data_uri(_bars(result)),
                }
            )
    return pictures


def _error(cell: Result) -> tuple[float, float]:
    low, high = cell["interval"] or (cell["value"], cell["value"])
    return 100 * (cell["value"] - low), 100 * (high - cell["value"])


def _curves(result: Result) -> Figure:
    """A panel for each RULER task, and one for their average; a line for each model."""
    names = short(result)
    ruler = [line for line in result["scores"] if line["length"] is not None]
    tasks = list(dict.fromkeys(line["task"] for line in ruler))
    panels = [*tasks, AVERAGE] if len(tasks) > 1 else tasks
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns + 1, 2.6 * rows), layout="tight")
    axes: Any = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    averages = _by_length(result)
    for panel, axis in zip(panels, axes, strict=False):
        for number, name in enumerate(result["models"]):
            style: Any = {"label": names[name], "color": COLOURS[number % len(COLOURS)]}
            style |= {"marker": "o", "linestyle": STROKES[number % len(STROKES)]}
            if panel == AVERAGE:
                points = averages.get(name, {})
                axis.plot([str(n) for n in points], [100 * v for v in points.values()], **style)
                continue
            cells = {
                line["length"]: line["models"][name]
                for line in sorted(ruler, key=lambda line: line["length"])
                if line["task"] == panel and name in line["models"]
            }
            errors = [*zip(*map(_error, cells.values()), strict=True)] or None
            values = [100 * cell["value"] for cell in cells.values()]
            axis.errorbar([str(n) for n in cells], values, errors, capsize=2, **style)
        axis.set_title(panel, fontsize=9)
        axis.set_ylim(-3, 103)
        axis.set_xlabel("tokens")
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    first: Any = figure.axes[0]
    first.set_ylabel("score, %")
    first.legend(frameon=False, fontsize=8)
    return figure


def _bars(result: Result) -> Figure:
    """A group for each score, a bar for each model."""
    names = short(result)
    scores = [line for line in result["scores"] if line["length"] is None]
    figure = Figure(figsize=(max(4.0, 1.4 * len(scores)) + 1, 3), layout="tight")
    axis: Any = figure.subplots()
    width = 0.8 / len(names)
    for number, name in enumerate(result["models"]):
        cells = ((i, line["models"].get(name)) for i, line in enumerate(scores))
        shown = [(i, cell) for i, cell in cells if cell is not None]
        places = [i + width * (number - (len(names) - 1) / 2) for i, _ in shown]
        errors = [*zip(*(_error(cell) for _, cell in shown), strict=True)] or None
        axis.bar(
            places,
            [100 * cell["value"] for _, cell in shown],
            width,
            yerr=errors,
            capsize=2,
            label=names[name],
            color=COLOURS[number % len(COLOURS)],
        )
    axis.set_xticks(range(len(scores)), [f"{line['job']}\n{line['score']}" for line in scores])
    axis.set_ylabel("score, %")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)
    return figure
