"""`iha lab report`: folders of results → one self-contained page, and its figures as PNG."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iha_lab.experiments import load
from iha_lab.experiments.summary import Comparison, Finished, Row, summarize
from iha_lab.report import figures, pages
from iha_lab.report.tables import Table
from iha_lab.run_folder import claim


@dataclasses.dataclass(frozen=True)
class Section:
    """All results of one folder."""

    title: str
    summary: str
    config: str
    tables: list[Table]
    figures: list[pages.Figure]


def write(folders: Sequence[Path], output: Path) -> Path:
    """Write `report.html` and PNGs into `output`; return the page's path.

    Raises ValueError where a folder holds no result, or `output` something else.
    """
    loaded = {folder: load(folder) for folder in folders}  # all, before anything is written
    ours = output.resolve() in [folder.resolve() for folder in folders]
    with contextlib.nullcontext() if ours else claim(output, {"command": "iha lab report"}):
        sections = [_section(folder, finished, output) for folder, finished in loaded.items()]
        return pages.write(output / "report.html", "report/lab_page.html.jinja", sections=sections)


def table(compared: Comparison) -> Table:
    """Show the first measure, its difference to plain attention, all other measures, and cost."""
    measures = list(compared.rows[0].measures)
    plain = next((row for row in compared.rows if row.attention == "mha"), None)
    columns = ["attention", measures[0], "minus mha", *measures[1:]]
    columns += ["parameters", "FLOPs", "seconds per run"]
    rows = [_cells(row, plain, measures[0]) for row in compared.rows]
    return Table(columns, rows, compared.title, compared.in_the_paper).dense()


def _cells(row: Row, plain: Row | None, first: str) -> list[str]:
    flops = row.cost["total_flops"]
    relative = f" ({flops / plain.cost['total_flops']:.2f}×)" if plain else ""
    measures = list(row.measures.values())
    difference = row.minus(plain, first) if plain and plain is not row else None
    return [
        row.attention + "".join(f", {axis} {value:g}" for axis, value in row.selected.items()),
        str(measures[0]),
        f"{difference.mean:+.4f} ± {difference.half:.2g}" if difference else "",
        *map(str, measures[1:]),
        f"{row.cost['parameters']:,}",
        f"{flops:.3g}{relative}",
        f"{row.seconds:.0f}",
    ]


def _section(folder: Path, finished: list[Finished], output: Path) -> Section:
    comparisons = summarize(finished)
    machines = {_machine(record.machine) for _, record in finished}
    config = folder / "config.yaml"
    return Section(
        title=folder.name,
        summary=f"{len(finished)} runs on {'; '.join(sorted(machines))}.",
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        tables=[table(compared) for compared in comparisons],
        figures=[f for compared in comparisons for f in _figures(compared, folder.name, output)],
    )


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['device']}, {machine['threads']} thread(s) per run, {machine['date']}"
        f" ({versions})"
    )


def _figures(compared: Comparison, name: str, output: Path) -> list[pages.Figure]:
    """Draw the first measure and every curve; each is saved as PNG too."""
    rows, first = compared.rows, next(iter(compared.rows[0].measures))
    measured = {
        row.attention: (row.measures[first], list(row.by_seed[first].values())) for row in rows
    }
    drawn = {first: figures.intervals(measured, first)}
    for curve in rows[0].curves:
        y, _, x = curve.partition(" over ")
        points = {row.attention: row.curves[curve] for row in rows if row.curves.get(curve)}
        drawn[curve] = figures.curves(points, x, y)
    found: list[pages.Figure] = []
    for what, figure in drawn.items():
        title = f"{compared.title}: {what}" if compared.title else what
        file = re.sub(r"[^a-z0-9]+", "-", f"{name} {title}".lower()).strip("-") + ".png"
        figures.save(figure, output / file)
        found.append(pages.Figure.of(figure, title))
    return found
