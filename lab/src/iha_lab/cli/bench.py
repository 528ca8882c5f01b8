"""`iha bench`: measure, show and keep what the operator costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from iha_lab.cli.console import whole_rows


def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(
            help="paper, small-p, decode, model, cpu, against-plain. Default: what the device fits."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: to see that everything runs.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of JSON and PNG.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Time every backend of this device on the same inputs.

    Each is checked against the reference first. Uses the GPU where there is one. Stopped, it leaves
    what it has measured.
    """
    from iha_lab.bench import against_plain, run
    from iha_lab.bench.cases import default_cases
    from iha_lab.machine import default_device
    from iha_lab.report import bench_tables, figures

    device = default_device()
    names = tuple(n for n in cases or default_cases(device) if n != against_plain.NAME)
    console = whole_rows()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    if cases and against_plain.NAME in cases:
        against_plain.bench(output, say)
        say(f"Written: {output / against_plain.NAME}.json.")
        if not names:
            return
    picture = output / f"bench-{run.slug(device)}.png"
    try:
        record = run.bench(names, device, output, quick, say)
    except KeyboardInterrupt:
        say(f"Stopped; what was measured is in {picture.with_suffix('.json')}.")
        raise typer.Exit(130) from None
    for name in names:
        part = record["cases"][name]
        console.rule(name, align="left")
        say(bench_tables.heading(part))
        for table in bench_tables.tables(part):
            shown = Table(title=table.title, title_justify="left")
            shown.add_column(table.columns[0], no_wrap=True)
            for column in table.columns[1:]:
                shown.add_column(column, justify="right")
            for row in table.rows:
                shown.add_row(*row)
            console.print(shown)
            if table.note:
                say(table.note)
    say(bench_tables.CAPTION)
    figures.save(bench_tables.figure(record), picture)
    say(f"Written: {picture.with_suffix('.json')} and {picture}.")
