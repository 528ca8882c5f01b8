"""What the commands show while they work."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

QUARTERS = 4
FEW_ROWS = 12  # that have lines between them


def whole_rows() -> Console:
    """The terminal; where output is redirected, wide. Of a run's processes the first speaks."""
    quiet = os.environ.get("RANK", "0") != "0"
    # The stream of now: where a library's prints are sent elsewhere for a while, ours still come.
    console = Console(file=sys.stdout, quiet=quiet)
    return console if console.is_terminal else Console(file=sys.stdout, quiet=quiet, width=160)


class Live(contextlib.AbstractContextManager["Live"]):
    """Progress on a terminal; elsewhere a plain line now and then."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=whole_rows(),
        )

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def section(self, title: str) -> None:
        self._progress.console.rule(title, align="left")

    def steps(self, title: str, total: int) -> Callable[[int, str], None]:
        terminal = self._progress.console.is_terminal
        task = self._progress.add_task(title, total=total, note="", visible=terminal)
        said = 0

        def tell(done: int, note: str) -> None:
            """Move the bar; a line at the end, and where there are no bars each quarter of it."""
            nonlocal said
            shown = terminal and done < total
            self._progress.update(task, completed=done, note=note, visible=shown)
            quarters = done * QUARTERS // max(total, 1)
            if quarters > said and not shown:
                took = self._progress.tasks[task].elapsed or 0
                self.say(f"{title}: {done}/{total} after {took:.0f} s {note}".rstrip())
            said = max(said, quarters)

        return tell

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        apart = len(rows) <= FEW_ROWS
        table = Table(*columns, title=title, title_justify="left", show_lines=apart)
        for row in rows:
            table.add_row(*row)
        self._progress.console.print(table)


def quiet_libraries() -> None:
    """transformers' own bars would draw over ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
