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
        if not self._progress.console.is_terminal:
            return self._lines(title, total)
        task = self._progress.add_task(title, total=total, note="")

        def tell(done: int, note: str) -> None:
            self._progress.update(task, completed=done, note=note)

        return tell

    def _lines(self, title: str, total: int) -> Callable[[int, str], None]:
        """A line each quarter of the way."""
        said = 0

        def tell(done: int, note: str) -> None:
            nonlocal said
            if done * QUARTERS // total > said:
                said = done * QUARTERS // total
                self.say(f"{title}: {done}/{total} {note}".rstrip())

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
