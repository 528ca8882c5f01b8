"""The real harness on questions of our own, with models that answer what a test says."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from iha_lab.eval import data, harness, sandbox, tasks
from iha_lab.eval.answers import Answers, prompt
from iha_lab.eval.harness import KeptLM, Settings
from iha_lab.eval.suites import Job, jobs
from lab.tests.eval.scripted import Answer, asked, gsm8k, number, save_jsonl, save_tiny, scripted
from tests.hf.families import tiny


def rows_of(
    job: Job, folder: Path, answer: Answer, data_folder: Path | None, limit: int | None = None
) -> list[dict[str, Any]]:
    model, _ = scripted(folder, answer)
    task = tasks.build(job, data_folder, None)
    return harness.run(model, job, task, limit, lambda done, note: None)


def scores(job: Job, rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {label: [row["scores"][label] for row in rows] for label in job.labels}


def test_gsm8k_with_five_examples_and_exact_match(tmp_path: Path) -> None:
    job, *_ = jobs("math", "pretrained", [], ["gsm8k"])

    def answer(prompt: str, before: int) -> str:
        assert prompt.count("Question: ") == 6
        n = number(prompt)
        return f" #### {2 * n}" if n % 2 else f" the answer is {2 * n}"  # the even ones: no format

    rows = rows_of(job, tmp_path / "a", answer, gsm8k(tmp_path, 4))
    assert scores(job, rows) == {"EM": [0, 1, 0, 1]}
    assert [asked(row["prompt"]) for row in rows] == [
        f"No. {n}: what is {n} + {n}?" for n in range(4)
    ]


def test_a_majority_wins_and_p_at_1_is_the_mean_over_samples(tmp_path: Path) -> None:
    (job,) = jobs("math", "finetuned", [], ["gsm8k"])
    right = {0: 16, 1: 9, 2: 7, 3: 0}  # how many of the 16 samples of a question are right

    def answer(prompt: str, before: int) -> str:
        n = number(prompt)
        return f"I say {2 * n if before < right[n] else 777}"

    rows = rows_of(job, tmp_path / "a", answer, gsm8k(tmp_path, 4))
    assert all(len(row["answers"]) == 16 for row in rows)
    found = scores(job, rows)
    assert found["P@1"] == pytest.approx([1, 9 / 16, 7 / 16, 0])
    assert found["Maj@16"] == [1, 1, 0, 0]


def test_the_samples_of_one_prompt_are_asked_one_by_one(tmp_path: Path) -> None:
    _, job = jobs("math", "pretrained", [], ["gsm8k"])
    task = tasks.build(job, gsm8k(tmp_path, 1), None)
    model, runner = scripted(tmp_path / "a", lambda prompt, before: f" #### {before}")
    (row,) = harness.run(model, job, task, None, lambda done, note: None)
    assert sorted(row["answers"]) == [f" #### {n}" for n in range(5)]
    assert len(runner.asked) == 5
    assert task.config.generation_kwargs["temperature"] == 0.6
    assert task.config.generation_kwargs["do_sample"] is True


def test_math_votes_on_the_extracted_answer(tmp_path: Path) -> None:
    row = {"problem": "What is 1 + 1?", "solution": "It is $\\boxed{2}$.", "answer": "2"}
    save_jsonl(tmp_path / "HuggingFaceH4" / "MATH-500" / "test.jsonl", [row] * 2)
    said = ["so $2$", "$2$", "two, $3$", "$3$ again", "indeed $2$"]  # five texts, two answers
    job = Job("hendrycks_math500", samples=5, temperature=0.6, labels=("P@1", "Maj@5"))
    rows = rows_of(job, tmp_path / "a", lambda prompt, before: said[before % 5], tmp_path)
    assert scores(job, rows) == {"P@1": [0.6, 0.6], "Maj@5": [1, 1]}


@pytest.fixture
def can_run_code() -> None:
    if (reason := sandbox.refusal()) is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("can_run_code")
def test_humaneval_runs_what_the_model_wrote(tmp_path: Path) -> None:
    problems = {row["prompt"]: row for row in data.local(data.HUMANEVAL, None, None)["test"]}  # type: ignore[index]
    assert len(problems) == 164

    def answer(prompt: str, before: int) -> str:
        problem = problems[prompt]
        right = problem["task_id"] in ("HumanEval/0", "HumanEval/2")
        return problem["canonical_solution"] if right else "    return None\n"

    (job,) = jobs("code", "greedy", [], ["humaneval"])
    rows = rows_of(job, tmp_path / "a", answer, None, limit=3)
    assert scores(job, rows) == {"P@1": [1, 0, 1]}


@pytest.mark.usefixtures("can_run_code")
@pytest.mark.parametrize("protocol", ["greedy", "finetuned"])
def test_mbpp_runs_what_the_model_wrote(tmp_path: Path, protocol: str) -> None:
    def row(n: int) -> dict[str, Any]:
        tests = [f"assert f({x}) == {x + n}" for x in range(3)]
        return {"task_id": n, "text": f"Add {n}.", "code": "", "test_list": tests}

    # The authors' one file of all problems: those from 11 to 510 are the test.
    file = tmp_path / "google-research-datasets" / "mbpp" / "mbpp.jsonl"
    save_jsonl(file, [row(n) for n in (9, 10, 11, 12, 510, 511)])

    def answer(prompt: str, before: int) -> str:
        n = int(re.findall(r"Add (\d+)\.", prompt)[-1])
        right = before % 2 == 0 and n != 12
        return f"def f(x):\n    return x + {n if right else 0}\n"

    (job,) = jobs("code", protocol, [], ["mbpp"])
    rows = rows_of(job, tmp_path / "a", answer, tmp_path)
    found = scores(job, rows)
    if protocol == "greedy":
        assert found == {"P@1": [1, 0, 1]}
        return
    # 8 of 16 samples are right; that none of 10 drawn ones is: no way, 8 wrong ones are too few.
    assert found["P@1"] == pytest.approx([0.5, 0, 0.5])
    assert found["P@10"] == pytest.approx([1, 0, 1])


def test_stopped_it_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    (job,) = jobs("math", "greedy", [], ["gsm8k"])
    task = tasks.build(job, gsm8k(tmp_path, 7), None)
    seen: list[str] = []

    def stops(prompt: str, before: int) -> str:
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(prompt)
        return f" #### {2 * number(prompt)}"

    model, _ = scripted(tmp_path / "a", stops)
    with pytest.raises(KeyboardInterrupt):
        harness.run(model, job, task, None, lambda done, note: None)

    model, runner = scripted(tmp_path / "a", lambda prompt, before: " #### -1")
    told: list[int] = []
    rows = harness.run(model, job, task, None, lambda done, note: told.append(done))
    assert len(runner.asked) == 3
    assert not set(runner.asked) & set(seen)
    assert sum(scores(job, rows)["EM"]) == 4  # those from before the stop
    assert told[-1] == 7

    model, runner = scripted(tmp_path / "a", lambda prompt, before: "")
    assert harness.run(model, job, task, None, lambda done, note: None) == rows
    assert runner.asked == []


def test_one_bad_question_fails_alone_and_is_asked_again(tmp_path: Path) -> None:
    (job,) = jobs("math", "greedy", [], ["gsm8k"])
    task = tasks.build(job, gsm8k(tmp_path, 4), None)

    def breaks(prompt: str, before: int) -> str:
        if number(prompt) == 2:
            raise RuntimeError("out of memory")
        return f" #### {2 * number(prompt)}"

    notes: list[str] = []
    model, _ = scripted(tmp_path / "a", breaks, batch_size=4)
    rows = harness.run(model, job, task, None, lambda done, note: notes.append(note))
    assert scores(job, rows) == {"EM": [1, 1, 0, 1]}
    assert [row["failed"] for row in rows] == [None, None, "RuntimeError: out of memory", None]
    assert notes[-1] == "1 failed"

    model, runner = scripted(tmp_path / "a", lambda prompt, before: " #### 4")
    rows = harness.run(model, job, task, None, lambda done, note: None)
    assert [number(prompt) for prompt in runner.asked] == [2]
    assert scores(job, rows) == {"EM": [1, 1, 1, 1]}
    assert not any(row["failed"] for row in rows)


def test_an_answer_that_cannot_be_scored_scores_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"problem": "What is 1 + 1?", "solution": "It is $\\boxed{2}$.", "answer": "2"}
    save_jsonl(
        tmp_path / "HuggingFaceH4" / "MATH-500" / "test.jsonl",
        [row | {"problem": "What is 4 - 2?"}, row],
    )
    job = Job("hendrycks_math500")
    task = tasks.build(job, tmp_path, None)
    utils = sys.modules["lm_eval.tasks.hendrycks_math.utils"]
    own = utils.is_equiv

    def breaks(answer: str, truth: str) -> Any:
        if "bad" in answer:
            raise ValueError("cannot read this")
        return own(answer, truth)

    monkeypatch.setattr(utils, "is_equiv", breaks)
    model, _ = scripted(
        tmp_path / "a", lambda prompt, before: "bad" if "4 - 2" in prompt else "$2$"
    )
    rows = harness.run(model, job, task, None, lambda done, note: None)
    assert scores(job, rows) == {"EM": [0, 1]}
    assert [row["failed"] for row in rows] == ["the answer could not be scored", None]


def test_a_line_that_a_kill_cut_off_is_no_answer(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    answers.write({"key": "a", "text": "one"})
    answers.write({"key": "b", "text": "two"})
    file = tmp_path / "answers-0.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    answers = Answers(tmp_path)
    assert answers.texts == {"a": "one"}
    answers.write({"key": "b", "text": "three"})
    assert Answers(tmp_path).texts == {"a": "one", "b": "three"}


def test_a_key_has_prompt_settings_and_the_number_of_the_sample() -> None:
    greedy, sampled = {"do_sample": False}, {"do_sample": True}
    asked = [("p", sampled, 0), ("p", sampled, 1), ("p", greedy, 0), ("q", sampled, 0)]
    assert len({prompt(*one).key for one in asked}) == 4
    # As in the files that are there already.
    assert prompt("p", greedy, 0).key == "c99efa13d0450363347a0971a479b26d"


def test_processes_share_the_questions_and_read_all_answers(tmp_path: Path) -> None:
    first, second = Answers(tmp_path, rank=0), Answers(tmp_path, rank=1)
    first.write({"key": "a", "text": "one"})
    second.write({"key": "b", "text": "two"})
    first.read()
    assert first.texts == {"a": "one", "b": "two"}


def sampled_answers(model: str, folder: Path, data_folder: Path, batch_size: int) -> list[Any]:
    _, job = jobs("math", "pretrained", [], ["gsm8k"], max_new_tokens=6)
    asked = KeptLM(model, folder, Settings(batch_size=batch_size))
    rows = harness.run(asked, job, tasks.build(job, data_folder, None), None, lambda *_: None)
    return [row["answers"] for row in rows]


def test_a_sampled_answer_depends_on_its_question_alone(tmp_path: Path) -> None:
    model, folder = save_tiny(tmp_path / "model"), gsm8k(tmp_path, 5)
    found = [sampled_answers(model, tmp_path / str(n), folder, n) for n in (1, 2, 5)]
    assert found[0] == found[1] == found[2]
    assert len({text for texts in found[0] for text in texts}) == 25
    # Stopped after some, and with another batch size, they are still the same.
    file = tmp_path / "5" / "answers-0.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[3:9]))
    assert sampled_answers(model, tmp_path / "5", folder, 3) == found[0]


def test_samples_have_the_models_distribution() -> None:
    """After temperature and cut-offs, drawn with a seed for each sequence."""
    model = tiny("llama").eval()
    given = torch.tensor([[5, 7, 9]])
    options: dict[str, Any] = {"temperature": 0.7, "top_k": 6, "max_new_tokens": 1}
    count = 4000
    drawn = model.generate(
        given.repeat(count, 1),
        do_sample=True,
        custom_generate=functools.partial(harness.sample, seeds=range(count)),
        **options,
    )[:, -1]
    logits = model(given).logits[0, -1] / 0.7
    expected = torch.zeros_like(logits)
    kept = logits.topk(6)
    expected[kept.indices] = kept.values.softmax(0)
    assert (drawn.bincount(minlength=len(logits)) / count - expected).abs().max() < 0.03
