"""The harness's own task, with our data and settings given through its interfaces.

No task is copied and none patched. A task's definition is a YAML file of the harness; as member of
a group it takes overrides of single fields, and one of these, `custom_dataset`, is a function that
returns the examples.
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from iha_lab.eval import data
from iha_lab.eval.suites import ESSAYS, RULER, Job

SEED = 1234  # the harness's own default, for examples and for the choice of few-shot examples
PACKAGE = Path(__file__).parent


def build(job: Job, folder: Path | None, examples: data.Rows | None) -> Any:
    """The task of a job, ready to be evaluated; `examples` are those of a RULER job.

    Raises MissingData with a sentence that says what to put where.
    """
    rows = data.splits(job.task, folder) if examples is None else {"test": examples}
    given = {} if rows is None else {"custom_dataset": _constant(rows)}
    task = load(job.task, given, folder)
    with _local_names(job.task, folder):
        changes = job.overrides(task.config)
    if changes:
        task = load(job.task, {**given, **changes}, folder)
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    return task


def ruler_examples(
    job: Job, tokenizer: Path, folder: Path | None, file: Path, limit: int | None
) -> data.Rows:
    """The first `limit` examples of a RULER task, made once and kept in `file`.

    The harness makes 500 of each length, measured with the tokenizer of a folder.
    """
    if file.exists():
        return data.read(file)
    import numpy

    random.seed(SEED)
    numpy.random.seed(SEED)
    sizes = {"tokenizer": str(tokenizer), "max_seq_lengths": [job.length]}
    task = load(job.task, {"dataset_kwargs": sizes}, folder)
    rows = list(task.dataset["test"])[:limit]
    data.write(file, rows)
    return rows


def _constant(rows: dict[str, data.Rows]) -> Callable[..., Any]:
    import datasets

    found = {split: datasets.Dataset.from_list(part) for split, part in rows.items()}
    return lambda **_: found


def load(name: str, overrides: dict[str, Any], folder: Path | None) -> Any:
    """A task of the harness with some fields of its definition replaced."""
    import datasets
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    where = Path(lm_eval.tasks.__file__).parent / _definitions(name)
    # All of the harness's 14 000 definitions would take seconds to look through.
    manager = TaskManager(include_path=where, include_defaults=False)
    datasets.disable_progress_bars()
    try:
        with _local_names(name, folder), quiet():
            return manager.load([{"group": "iha", "task": [{"task": name, **overrides}]}])["tasks"][
                name
            ]
    except (ImportError, AssertionError) as error:
        extra = "math" if "math" in name else "ruler"
        raise data.MissingData(
            f"{name} needs packages that are not installed; run pip install 'lm-eval[{extra}]'."
        ) from error
    except (OSError, LookupError) as error:
        raise data.MissingData(_what_to_put_where(name, error)) from error


def _definitions(name: str) -> str:
    """The harness's folder that defines a task."""
    return "ruler" if name in RULER else name.replace("_math500", "_math")


def _what_to_put_where(name: str, error: Exception) -> str:
    if "punkt" in str(error):
        return (
            f"{name} cuts essays into sentences with NLTK's punkt_tab, which is not here; unpack"
            " punkt_tab.zip (nltk.org/nltk_data) in DIR/nltk_data/tokenizers and give --data DIR."
        )
    if name.startswith("ruler_qa"):
        return f"{name} reads its questions from the network alone, which did not give them."
    source = data.SOURCES.get(name)
    hub = data.ESSAYS if source is None else source.hub
    return (
        f"{name} needs the data set {hub}, and the hub did not give it; put its files (or the"
        f" authors' .jsonl) into DIR/{hub} and give --data DIR."
    )


@contextlib.contextmanager
def _local_names(name: str, folder: Path | None) -> Generator[None]:
    """Make relative names mean local folders, which both libraries look up before the hub.

    "code_eval", the metric, is beside this file; "baber/paul_graham_essays" may be in `folder`.
    """
    before, place = Path.cwd(), PACKAGE
    if name in RULER:
        place = place if folder is None else folder.resolve()
        _sentence_splitter(name, place / "nltk_data")
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def _sentence_splitter(name: str, folder: Path) -> None:
    """Let NLTK find its sentence splitter in `folder`, or the network, for tasks that need it.

    The harness looks for it, and asks the network, as soon as its module is imported; an empty
    folder of that name spares this to tasks that have no sentences.
    """
    import nltk

    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))
    with tempfile.TemporaryDirectory() as empty:
        Path(empty, "tokenizers", "punkt_tab").mkdir(parents=True)
        nltk.data.path.append(empty)
        from lm_eval.tasks.ruler.prepare_niah import download_nltk_resources

        nltk.data.path.remove(empty)
    if name in ESSAYS:
        download_nltk_resources()


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without the harness's bars and prints, which would draw over ours."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
