"""The result of an evaluation as tables, figures and one self-contained page, report.html."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from iha_lab import paper
from iha_lab.report import figures, pages
from iha_lab.report.tables import Table

Result = dict[str, Any]  # what run.summary gives
MULTI_KEY = ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3")
AVERAGE = "average of these tasks"
CAPTION = (
    "In percent, with 95 % intervals: Wilson's where each question scores 0 or 1, else the"
    " bootstrap over questions. Below: the difference to the first model in points, with the paired"
    " bootstrap's interval (10 000 resamples, fixed seed), and how many questions got the very same"
    " answers."
)


def short(result: Result) -> dict[str, str]:
    """The last part of each model's name, if that tells them apart."""
    names = {name: Path(name).name or name for name in result["models"]}
    return names if len(set(names.values())) == len(names) else {name: name for name in names}


def table(result: Result) -> Table:
    """All scores: a row for each, a column for each model."""
    rows = [
        [line["job"], line["score"], str(line["questions"])]
        + [_cell(line["models"].get(name), line["questions"]) for name in result["models"]]
        for line in result["scores"]
    ]
    if result["average_rank"]:
        ranks = [f"{result['average_rank'][name]:.2f}" for name in result["models"]]
        rows.append(["average rank", "", f"{result['ranked_scores']} scores", *ranks])
    columns = ["task", "score", "questions", *short(result).values()]
    return Table(columns, rows, note=CAPTION)


def _cell(cell: Result | None, questions: int) -> str:
    """What the table says of one model and score, in lines."""
    if cell is None:
        return "–"
    lines = [_percent(cell)]
    if "difference" in cell:
        same = cell["difference"]["value"] == 0 and cell["difference"]["interval"] is None
        lines.append("no question scored otherwise" if same else _percent(cell["difference"], "+"))
        lines.append(f"identical answers: {cell['identical']} of {questions}")
    if cell["failed"]:
        lines.append(f"failed: {cell['failed']} of {questions}")
    return "\n".join(lines)


def _percent(cell: Result, sign: str = "") -> str:
    """A mean or a difference with its interval, in percent."""
    value, *ends = (f"{100 * v:{sign}.1f}" for v in (cell["value"], *(cell["interval"] or ())))
    return f"{value} ({' to '.join(ends)})" if ends else value


def write(result: Result, folder: Path) -> Path:
    """`report.html` in that folder."""
    return pages.write(
        folder / "report.html",
        "eval/report.html.jinja",
        result=result,
        names=short(result),
        scores=table(result),
        figures=list(_figures(result)),
        paper=[*_paper_tables(result), *_ruler_tables(result)],
        source=paper.SOURCE,
    )


def _paper_tables(result: Result) -> Iterator[Table]:
    """The paper's tables, and our scores of the same kind below."""
    lines = {(line["job"], line["score"]): line["models"] for line in result["scores"]}
    for printed in paper.TABLES:
        rows: list[list[str]] = []
        for row, model in enumerate(paper.MODELS):
            values = [column.values[row] for column in printed.columns]
            given = ("not given" if value is None else str(value) for value in values)
            rows.append([f"paper: {model}", *given, str(printed.average_rank[row])])
        for name, label in short(result).items():
            cells = [lines.get(column.ours, {}).get(name) for column in printed.columns]
            rows.append([label, *("–" if cell is None else _percent(cell) for cell in cells), ""])
        columns = ["", *(column.title for column in printed.columns), "average rank"]
        yield Table(columns, rows, printed.title)


def _ruler_tables(result: Result) -> Iterator[Table]:
    """Relative gains in multi-key retrieval by length, and the average over RULER."""
    names = short(result)
    first, *others = (_by_length(result, name, MULTI_KEY) for name in names)
    lengths = sorted({*paper.MULTI_KEY, *first})
    paper_gains = [f"{paper.MULTI_KEY[n]:+d} %" if n in paper.MULTI_KEY else "–" for n in lengths]
    rows = [["paper: IHA over Global Attention, Figure 2", *paper_gains]]
    base, *labels = names.values()
    for label, means in zip(labels, others, strict=True):
        gains = [
            f"{100 * (means[n] / first[n] - 1):+.0f} %" if n in means and first.get(n) else "–"
            for n in lengths
        ]
        rows.append([f"{label} over {base}", *gains])
    columns = ["multi-key retrieval, relative gain", *(f"{n} tokens" for n in lengths)]
    yield Table(columns, rows, "RULER")
    rows = [
        [f"paper: {model}", "not known to us" if value is None else str(value)]
        for model, value in paper.RULER_AVERAGE.items()
    ]
    for name, label in names.items():
        if means := _by_length(result, name):
            average = f"{100 * statistics.fmean(means.values()):.1f}"
            rows.append([f"{label}, the RULER tasks and lengths above", average])
    yield Table(["average over RULER", "exact match, %"], rows)


def _by_length(result: Result, name: str, tasks: Sequence[str] | None = None) -> dict[int, float]:
    """A model's mean over RULER tasks, for each length at which all have been run."""
    lines = [line for line in result["scores"] if line["length"] is not None]
    lines = [line for line in lines if tasks is None or line["task"] in tasks]
    cells: dict[int, list[Result | None]] = {}
    for line in lines:
        cells.setdefault(line["length"], []).append(line["models"].get(name))
    means = {n: [c["value"] for c in found if c is not None] for n, found in cells.items()}
    return {n: statistics.fmean(means[n]) for n in sorted(means) if len(means[n]) == len(cells[n])}


def _figures(result: Result) -> Iterator[pages.Figure]:
    """RULER over length, a panel for each task and one for their average; then the other scores."""
    ruler: dict[str, dict[str, dict[str, Result]]] = {}  # panel, model, length
    others: dict[str, dict[str, Result]] = {}  # model, score
    for line in sorted(result["scores"], key=lambda line: line["length"] or 0):
        for name, cell in line["models"].items():
            if line["length"] is None:
                others.setdefault(name, {})[f"{line['job']}\n{line['score']}"] = cell
            else:
                of = ruler.setdefault(line["task"], {}).setdefault(name, {})
                of[str(line["length"])] = cell
    if len(ruler) > 1:
        ruler[AVERAGE] = {
            name: {
                str(n): {"value": v, "interval": None} for n, v in _by_length(result, name).items()
            }
            for name in result["models"]
        }
    if ruler:
        caption = "Ours. Lines are 95 % intervals of single scores."
        yield pages.Figure.of(_drawn(result, ruler, 3.4), "RULER over length", caption)
    if others:
        width = 1.4 * max(map(len, others.values()))
        drawn = _drawn(result, {"": others}, max(3.4, width), linestyle="none")
        yield pages.Figure.of(drawn, "Mathematics and code", "Ours, with 95 % intervals.")


def _drawn(result: Result, panels: dict[str, Any], width: float, **options: Any) -> Any:
    """Points side by side for each model, so that equal ones all stay visible."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = figures.panels(rows, columns, width * columns + 1, 2.6 * rows, sharey=True)
    names = short(result)
    looks = figures.looks(list(names.values()))
    for axis, (title, models) in zip(grid.flat, panels.items(), strict=False):
        ticks = list(dict.fromkeys(tick for cells in models.values() for tick in cells))
        for number, (name, cells) in enumerate(models.items()):
            look = looks[names[name]] | options
            xs = [ticks.index(tick) + 0.06 * (number - (len(models) - 1) / 2) for tick in cells]
            axis.plot(
                xs, [100 * cell["value"] for cell in cells.values()], label=names[name], **look
            )
            ends = [cell["interval"] or (cell["value"],) * 2 for cell in cells.values()]
            low, high = zip(*ends, strict=True)
            axis.vlines(xs, [100 * v for v in low], [100 * v for v in high], color=look["color"])
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set_xlim(-0.5, len(ticks) - 0.5)
        axis.set_title(title)
        axis.set_ylim(-3, 103)
    for axis in grid.flat[len(panels) :]:
        axis.set_visible(False)
    grid[0, 0].set_ylabel("score, %")
    figures.legend(grid[0, 0])
    return figure
