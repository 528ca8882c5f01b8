"""`iha lab report`: folders of results → one self-contained page, and its pictures as PNG."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iha_lab.experiments import parse, records
from iha_lab.experiments.base import Experiment
from iha_lab.experiments.records import Record
from iha_lab.experiments.summary import Group, Row, summarize
from iha_lab.report import figures, pages


@dataclasses.dataclass(frozen=True)
class Picture:
    title: str
    uri: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A row for each attention; `difference` is to the first, plain attention, paired by seed."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    in_the_paper: str


@dataclasses.dataclass(frozen=True)
class Section:
    """All results of one folder."""

    title: str
    summary: str
    config: str
    tables: list[Table]
    pictures: list[Picture]


def load(folder: Path) -> list[tuple[Experiment, Record]]:
    """Every finished run of a folder. ValueError where there is none."""
    found = records.read(folder / records.FILE)
    if not found:
        raise ValueError(
            f"folder {str(folder)!r} holds no finished run ({records.FILE}); name one that"
            " 'iha lab' has written."
        )
    return [(parse(record.config), record) for record in found]


def report(folders: Sequence[Path], output: Path) -> Path:
    """Write `report.html` and PNGs into `output`; return the page's path."""
    loaded = {folder: load(folder) for folder in folders}  # all, before anything is written
    sections = [_section(folder, runs, output) for folder, runs in loaded.items()]
    return pages.write(output / "report.html", "report/experiments.html.jinja", sections=sections)


def table(group: Group) -> Table:
    """Cost, then every measure, then the difference to plain attention in the first measure."""
    first = next(iter(group.rows[0].measures))
    plain = next((row for row in group.rows if row.attention == "mha"), None)
    columns = ["attention", "parameters", "FLOPs", *group.rows[0].measures, "seconds a run"]
    columns += [f"{first}, minus mha"] if plain else []
    rows = [_cells(row, plain, first) for row in group.rows]
    return Table(group.title, columns, rows, group.in_the_paper)


def _cells(row: Row, plain: Row | None, first: str) -> list[str]:
    flops = row.cost["total_flops"]
    relative = f" ({flops / plain.cost['total_flops']:.2f}×)" if plain else ""
    name = row.attention + "".join(f", {axis} {value:g}" for axis, value in row.selected.items())
    cells = [name, f"{row.cost['parameters']:,}", f"{flops:.3g}{relative}"]
    cells += [str(interval) for interval in row.measures.values()]
    cells.append(f"{row.seconds:.0f}")
    if plain:
        difference = None if row is plain else row.minus(plain, first)
        cells.append(
            "" if difference is None else f"{difference.mean:+.4f} ± {difference.half:.2g}"
        )
    return cells


def _section(folder: Path, runs: list[tuple[Experiment, Record]], output: Path) -> Section:
    experiment = runs[0][0]
    groups = summarize(type(experiment), runs)
    machines = {_machine(record.machine) for _, record in runs}
    config = folder / "config.yaml"
    return Section(
        title=folder.name,
        summary=f"{len(runs)} runs on {'; '.join(sorted(machines))}.",
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        tables=[table(group) for group in groups],
        pictures=[p for group in groups for p in _pictures(group, folder.name, output)],
    )


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['device']}, {machine['threads']} thread(s) a run, {machine['date']} ({versions})"
    )


def _pictures(group: Group, name: str, output: Path) -> list[Picture]:
    first = next(iter(group.rows[0].measures))
    heights = {row.attention: row.measures[first] for row in group.rows}
    drawn = {
        first: figures.bars(
            {name: (found.mean, found.half) for name, found in heights.items()}, first
        )
    }
    for curve in group.rows[0].curves:
        y, _, x = curve.partition(" over ")
        points = {
            row.attention: [
                (at, found.mean, 0.0 if math.isnan(found.half) else found.half)
                for at, found in row.curves[curve]
            ]
            for row in group.rows
            if row.curves.get(curve)
        }
        drawn[curve] = figures.mean_curves(points, x, y)
    return [
        _saved(f"{group.title}: {title}" if group.title else title, figure, name, output)
        for title, figure in drawn.items()
    ]


def _saved(title: str, figure: Any, name: str, output: Path) -> Picture:
    file = output / (re.sub(r"[^a-z0-9]+", "-", f"{name} {title}".lower()).strip("-") + ".png")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130, bbox_inches="tight")
    return Picture(title, figures.data_uri(figure))
