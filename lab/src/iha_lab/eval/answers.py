"""What one model wrote, kept line by line as it comes.

The harness has a cache of its own (`CachingLM`), but it never keeps sampled answers: its key makes
all samples of a prompt one. Here the key has the number of the sample too. As `CacheHook`, this is
where the harness's model class gives each answer as soon as it has it.
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.model import CacheHook


class Prompt(str):
    """A prompt that knows the key of its answer, wherever the harness sorts it."""

    key: str

    @property
    def seed(self) -> int:
        return int(self.key[:15], 16)


def prompt(text: str, settings: Mapping[str, Any], sample: int) -> Prompt:
    """With a key for this text, these generation settings, and this number of a sample."""
    found = Prompt(text)
    content = f"{sample} {json.dumps([text, settings], sort_keys=True)}"
    found.key = hashlib.sha256(content.encode()).hexdigest()[:32]
    return found


class Answers(CacheHook):
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
                    self._take(json.loads(line))
                except ValueError:
                    continue  # cut off by a kill while it was written

    def _take(self, row: dict[str, str]) -> None:
        if "error" in row:
            self.errors[row["key"]] = row["error"]
        else:
            self.texts[row["key"]] = row["text"]
            self.errors.pop(row["key"], None)

    def write(self, row: dict[str, str]) -> None:
        """{"key", "text"}, or {"key", "error"} for a question on which the model failed."""
        with self.file.open("ab+") as file:
            # A line that a kill cut off has no end: whatever comes next starts on a new one.
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")
        self._take(row)

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        """Called by the harness for each answer: `req` is (prompt, generation settings)."""
        asked, _ = req
        if asked.key not in self.errors:  # which is written already
            self.write({"key": asked.key, "text": res})
