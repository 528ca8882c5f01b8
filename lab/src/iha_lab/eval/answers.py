"""What one model wrote, kept line by line as it comes.

The harness has a cache of its own (`CachingLM`); it does not keep sampled answers, since its key
makes all samples of a prompt one. Here the key has the number of the sample too, and the file is
of one model alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def keys(requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """A key for each (prompt, generation settings); the n-th of equal ones has n in its key."""
    seen: Counter[str] = Counter()
    found: list[str] = []
    for request in requests:
        content = json.dumps(request, sort_keys=True)
        found.append(hashlib.sha256(f"{seen[content]} {content}".encode()).hexdigest()[:32])
        seen[content] += 1
    return found


class Answers:
    """Answers by key, in files of JSON lines; each process writes one and reads all."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.file = folder / f"answers-{rank}.jsonl"
        self.read()

    def read(self) -> None:
        self.texts: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        for file in sorted(self.folder.glob("answers-*.jsonl")):
            for line in file.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # cut off by a kill while it was written
                self._take(row)

    def _take(self, row: dict[str, str]) -> None:
        if "error" in row:
            self.errors[row["key"]] = row["error"]
        else:
            self.texts[row["key"]] = row["text"]
            self.errors.pop(row["key"], None)

    def add(self, rows: Iterable[dict[str, str]]) -> None:
        """Rows of {"key", "text"}, or of {"key", "error"} for a question that broke."""
        rows = list(rows)
        # A line that a kill cut off has no end: whatever comes next starts on a new one.
        with self.file.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        for row in rows:
            self._take(row)
