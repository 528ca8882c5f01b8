"""The harness's own tasks, given data from here; what is said where there is none."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from iha_lab.eval import data, tasks
from iha_lab.eval.suites import Job
from lab.tests.data.test_examples import words
from lab.tests.eval.scripted import gsm8k, save_jsonl


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    words().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_needles_among_needles_need_no_data(tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl.gz"
    job = Job("niah_multikey_2", 300)
    rows = tasks.ruler_examples(job, tokenizer, None, file, limit=3)
    assert len(rows) == 3
    for row in rows:
        (value,) = row["outputs"]
        key = row["gen_prefix"].removeprefix("The special magic number for ").split(" ")[0]
        assert f"One of the special magic numbers for {key} is: {value}." in row["input"]
        assert len(row["input"].split()) + 128 <= 300
    # Kept, and the same in the next process: the seed is the harness's.
    assert tasks.ruler_examples(job, tokenizer / "gone", None, file, limit=3) == rows
    again = tasks.ruler_examples(job, tokenizer, None, tmp_path / "again.jsonl.gz", limit=2)
    assert again == rows[:2]
    task = tasks.build(job, None, rows)
    assert [dict(doc) for doc in task.eval_docs] == rows


def test_essays_come_from_the_data_folder(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "nltk_data" / "tokenizers").mkdir(parents=True)
    essay = {"text": "w1 w2 w3 w4 w5 w6. " * 400}
    save_jsonl(tmp_path / "data" / "baber" / "paul_graham_essays" / "train.jsonl", [essay])
    job = Job("niah_multikey_1", 600)
    # NLTK's splitter of sentences is data too, which tests do not have.
    with pytest.raises(data.MissingData, match=r"niah_multikey_1 cuts essays .* punkt_tab"):
        tasks.ruler_examples(job, tokenizer, tmp_path / "data", tmp_path / "x.jsonl.gz", 1)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job("gsm8k"), r"gsm8k needs the data set openai/gsm8k, .* into DIR/openai/gsm8k and give"),
        (Job("hendrycks_math500"), r"put its files .* into DIR/HuggingFaceH4/MATH-500"),
    ],
)
def test_missing_data_is_one_sentence(job: Job, message: str, tmp_path: Path) -> None:
    with pytest.raises(data.MissingData, match=message):
        tasks.build(job, tmp_path, None)


def test_missing_essays_are_one_sentence(tokenizer: Path, tmp_path: Path) -> None:
    from lm_eval.tasks.ruler.prepare_niah import get_haystack

    get_haystack.cache_clear()  # of essays that another test had
    job = Job("niah_single_2", 600)
    with pytest.raises(data.MissingData, match="DIR/baber/paul_graham_essays"):
        tasks.ruler_examples(job, tokenizer, None, tmp_path / "x.jsonl.gz", 1)


def test_an_empty_data_set_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    with pytest.raises(data.MissingData, match=r"holds no train\.jsonl .* hub's openai/gsm8k"):
        tasks.build(Job("gsm8k"), tmp_path, None)


def test_rows_are_the_same_from_every_format(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = data.local("openai/gsm8k", "main", gsm8k(tmp_path, 3))["test"]  # type: ignore[index]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert data.read(tmp_path / "a.jsonl.gz") == rows

    hub = tmp_path / "hub" / "openai" / "gsm8k" / "main"  # as a snapshot of the hub has it
    hub.mkdir(parents=True)
    for split in ("train", "test"):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), hub / f"{split}-0-of-1.parquet"
        )
    assert data.local("openai/gsm8k", "main", tmp_path / "hub") == {"train": rows, "test": rows}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "?"}\n{broken\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not JSON"):
        data.read(tmp_path / "a.jsonl")


def test_the_working_folder_stays(tmp_path: Path) -> None:
    before = Path.cwd()
    tasks.build(Job("gsm8k"), gsm8k(tmp_path, 1), None)
    assert Path.cwd() == before


def test_missing_packages_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    row = {"problem": "?", "solution": "$\\boxed{2}$", "answer": "2"}
    save_jsonl(tmp_path / "HuggingFaceH4" / "MATH-500" / "test.jsonl", [row])
    with pytest.raises(data.MissingData, match=r"run pip install 'lm-eval\[math\]'\.$"):
        tasks.build(Job("minerva_math500"), tmp_path, None)
