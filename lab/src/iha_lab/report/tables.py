"""Tables for pages, consoles and Markdown, and Markdown files that a script writes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).parents[4]


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; `note` stands below the table."""

    columns: list[str]
    rows: list[list[str]]
    title: str = ""
    note: str = ""

    def dense(self) -> Table:
        """Leave out columns that are empty in every row."""
        kept = [i for i in range(len(self.columns)) if any(row[i] for row in self.rows)]
        rows = [[row[i] for i in kept] for row in self.rows]
        return dataclasses.replace(self, columns=[self.columns[i] for i in kept], rows=rows)

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def generated(file: Path, text: str, module: str) -> None:
    """Write a file that `python -m module` makes; with `--check`, exit 1 if it is out of date."""
    if sys.argv[1:] != ["--check"]:
        file.write_text(text, encoding="utf-8")
    elif not file.exists() or file.read_text(encoding="utf-8") != text:
        sys.exit(f"{file.name} is out of date; run python -m {module}.")
