"""The harness's own tasks, given our data and settings; none is copied and none changed."""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import contextlib
import functools
import os
import random
import types
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from iha_lab.eval import data, sandbox
from iha_lab.eval.suites import ESSAYS, RULER, Job

SEED = 1234  # the harness's own default, for examples and for the choice of few-shot examples
UNSCORED = "unscored"


def build(job: Job, folder: Path | None, examples: data.Rows | None) -> Any:
    """The task of a job, ready to be evaluated; `examples` are those of a RULER job.

    Raises MissingData with a sentence that says what to put where.
    """
    import datasets

    given = {}
    if examples is not None:
        kept = {"test": datasets.Dataset.from_list(examples)}
        given = {"custom_dataset": lambda **_: kept}
    task = load(job.task, folder, **given)
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    generation: dict[str, Any] = {}
    if job.max_new_tokens is not None:
        generation["max_gen_toks"] = job.max_new_tokens
    if job.samples > 1:
        generation |= {"do_sample": True, "temperature": job.temperature}
    task.set_config("generation_kwargs", generation, update=True)
    _tolerate(task)
    return task


def _tolerate(task: Any) -> None:
    """An answer that the task's own scoring cannot read scores 0."""
    score = task.config.process_results
    if not callable(score):
        return

    def tolerant(doc: Any, results: Any) -> Any:
        try:
            return score(doc, results)
        except Exception:
            return dict.fromkeys([*task.aggregation(), UNSCORED], 0.0)

    task.set_config("process_results", tolerant)


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
    task = load(job.task, folder, dataset_kwargs=sizes)
    rows = list(task.dataset["test"])[:limit]
    data.write(file, rows)
    return rows


def load(name: str, folder: Path | None, **changes: Any) -> Any:
    """A task of the harness with some fields of its definition replaced."""
    import datasets
    import evaluate
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    # All of the harness's 14 000 definitions would take seconds to look through.
    place = "ruler" if name in RULER else name.replace("_math500", "_math")
    where = Path(lm_eval.tasks.__file__).parent / place
    manager = TaskManager(include_path=where, include_defaults=False)
    datasets.disable_progress_bars()
    # The code tasks load this metric from the hub; it would run programs without a sandbox.
    metric = {"code_eval": types.SimpleNamespace(compute=code_eval)}
    try:
        with (
            quiet(),
            data.served(name, folder),
            mock.patch.object(evaluate, "load", metric.__getitem__),
        ):
            if name in RULER:
                _sentence_splitter(name, folder)
            group = {"group": "iha", "task": [{"task": name, **changes}]}
            return manager.load([group])["tasks"][name]
    except (ImportError, AssertionError) as error:
        extra = "math" if "math" in name else "ruler"
        raise data.MissingData(
            f"{name} needs packages that are not installed; run pip install 'lm-eval[{extra}]'."
        ) from error
    except (OSError, LookupError) as error:
        if "punkt" in str(error):
            raise data.MissingData(
                f"{name} cuts essays into sentences with NLTK's punkt_tab, which is not here;"
                " unpack punkt_tab.zip (nltk.org/nltk_data) in DIR/nltk_data/tokenizers and give"
                " --data DIR."
            ) from error
        raise data.MissingData(
            f"{name} reads its questions from the network alone, which did not give them."
        ) from error


def _sentence_splitter(name: str, folder: Path | None) -> None:
    """Let NLTK find its sentence splitter in `folder`, or the network, for tasks that need it."""
    import nltk

    if folder is not None and (place := str(folder / "nltk_data")) not in nltk.data.path:
        nltk.data.path.append(place)
    with mock.patch.object(nltk, "download"):  # the harness asks for it as soon as it is imported
        from lm_eval.tasks.ruler.prepare_niah import download_nltk_resources
    if name in ESSAYS:
        download_nltk_resources()


def code_eval(
    references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
) -> tuple[dict[str, float], dict[int, Any]]:
    """`compute` of the metric "code_eval" of `evaluate` for the harness's use of it, sandboxed.

    Each problem has programs (`predictions`) and its tests (`references`); pass@1 is the share of
    programs that pass.
    """
    pairs = zip(references, predictions, strict=True)
    runs = [f"{program}\n{test}" for test, programs in pairs for program in programs]
    passed = [sandbox.run_program(source, seconds=3).passed for source in runs]
    return {"pass@1": sum(passed) / len(passed)}, {}


@functools.cache
def _nowhere() -> TextIO:  # never closed: some libraries keep the stream that they first saw
    return open(os.devnull, "w")


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without the harness's bars and prints, which would draw over ours."""
    with contextlib.redirect_stdout(_nowhere()), contextlib.redirect_stderr(_nowhere()):
        yield
