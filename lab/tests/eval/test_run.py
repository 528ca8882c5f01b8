"""Several models, whole: tiny ones, the real harness."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from iha_lab.eval import data, report, run, suites
from iha_lab.eval.harness import KeptLM, Settings
from lab.tests.eval.scripted import gsm8k, save_tiny


class Recorder:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.progress: dict[str, list[int]] = {}

    def say(self, text: str) -> None:
        self.said.append(text)

    def steps(self, title: str, total: int) -> Callable[[int, str], None]:
        seen = self.progress.setdefault(title, [])
        return lambda done, note: seen.append(done)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    where = tmp_path_factory.mktemp("models")
    plain, same = save_tiny(where / "plain"), save_tiny(where / "upcycled", pseudo_heads=2)
    return plain, same, save_tiny(where / "other", seed=1)


def test_an_upcycled_model_gives_identical_answers(
    models: tuple[str, str, str], tmp_path: Path
) -> None:
    jobs = suites.jobs("ruler", "greedy", [1000, 1200], ["niah_multikey_2"], max_new_tokens=5)
    plan = run.Plan(models, (*jobs,), tmp_path, limit=3, settings=Settings(batch_size=2))
    console = Recorder()
    result = run.evaluate(plan, console)
    assert result is not None
    plain, same, other = models
    for line in result["scores"]:
        assert line["questions"] == 3
        assert line["models"][same]["identical"] == 3
        assert line["models"][same]["difference"] == {"value": 0.0, "interval": None}
        assert line["models"][other]["identical"] < 3
    assert result["average_rank"] == dict.fromkeys(models, 2.0)  # all wrong: ties
    assert console.progress[f"{plain}: niah_multikey_2@1000"][-1] == 3

    samples = sorted((tmp_path / "samples").glob("*/*.jsonl.gz"))
    assert len(samples) == 6
    rows = data.read(samples[0])
    assert all(len(row["answers"]) == 1 and row["prompt"] for row in rows)
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))

    prompts = [[row["prompt"] for row in data.read(f)] for f in samples if "@1200" in f.name]
    assert prompts[0] == prompts[1] == prompts[2]

    _page_is_whole(report.write(result, tmp_path), result)


def _page_is_whole(page: Path, result: dict[str, Any]) -> None:
    html = unescape(page.read_text())
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert "http" not in html
    assert html.count("data:image/png;base64,") == 1
    assert "identical answers: 3 of 3" in html
    assert html.count("<td>paper: ") >= 15
    assert "not known to us" in html
    for number in ("54.2", "8.34", "+112 %", "44.0"):  # the paper's
        row = next(part for part in html.split("<tr") if f"{number}<" in part)
        assert row.startswith("><td>paper: ")


def test_the_same_command_again_asks_nothing(
    models: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = (*suites.jobs("math", "greedy", [], ["gsm8k"], max_new_tokens=2),)
    plan = run.Plan((models[0],), jobs, tmp_path / "out", data=gsm8k(tmp_path, 5))
    first = run.evaluate(plan, Recorder())

    calls: list[int] = []
    generate = transformers.GenerationMixin.generate

    def counted(self: Any, input_ids: Any, **options: Any) -> Any:
        calls.append(len(input_ids))
        return generate(self, input_ids, **options)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", counted)
    assert run.evaluate(plan, Recorder()) == first
    assert calls == []
    # Changed weights are another model.
    (Path(models[0]) / "model.safetensors").touch()
    assert run.evaluate(plan, Recorder()) == first
    assert sum(calls) == 5


def test_several_processes_give_the_answers_of_one(
    models: tuple[str, str, str], tmp_path: Path
) -> None:
    folder = gsm8k(tmp_path, 3)
    jobs = (*suites.jobs("math", "pretrained", [], ["gsm8k"], max_new_tokens=3),)
    settings = Settings(batch_size=3)
    plan = run.Plan(models[:1], jobs, tmp_path / "one", 3, folder, settings=settings)
    run.evaluate(plan, Recorder())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "iha_lab.cli", "eval", models[0], "--tasks", "gsm8k"]
    command += ["--protocol", "pretrained", "--limit", "3"]
    command += ["--data", str(folder), "--max-new-tokens", "3", "-o", str(tmp_path / "two")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    files = sorted((tmp_path / "one" / "samples").glob("*/*.gz"))
    assert len(files) == 2
    for file in files:
        again = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert data.read(again) == data.read(file)
    kept = (tmp_path / "two" / "answers").glob("*/*.jsonl")
    assert sorted(file.name for file in kept) == ["answers-0.jsonl", "answers-1.jsonl"]


def test_chunked_prefill_changes_no_answer(models: tuple[str, str, str], tmp_path: Path) -> None:
    jobs = (*suites.jobs("math", "greedy", [], ["gsm8k"], max_new_tokens=4),)
    folder = gsm8k(tmp_path, 4)
    answers: list[Any] = []
    for chunk in (None, 8):
        settings = Settings(prefill_chunk=chunk, batch_size=2)
        output = tmp_path / str(chunk)
        run.evaluate(
            run.Plan((models[1],), jobs, output, data=folder, settings=settings), Recorder()
        )
        (file,) = (output / "samples").glob("*/*.jsonl.gz")
        answers.append([row["answers"] for row in data.read(file)])
    assert answers[0] == answers[1]
    assert all(text for (text,) in answers[0])


def test_an_adapter_on_an_upcycled_model(models: tuple[str, str, str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from iha_lab.models import load

    base, tokenizer = load(models[1])
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    given = tokenizer("w1 w2 w3", return_tensors="pt")
    model = KeptLM(str(tmp_path / "adapter"), tmp_path / "answers", Settings())
    assert model.config.iha
    torch.testing.assert_close(model.model(**given).logits, adapted(**given).logits)
    before = run.identity(model.pretrained)
    os.utime(Path(models[1]) / "model.safetensors")
    assert run.identity(model.pretrained) != before


def test_left_out_tasks_are_said_and_the_others_run(
    models: tuple[str, str, str], tmp_path: Path
) -> None:
    names = ["hendrycks_math500", "gsm8k"]
    jobs = (*suites.jobs("math", "greedy", [], names, max_new_tokens=2),)
    plan = run.Plan((models[0],), jobs, tmp_path / "out", data=gsm8k(tmp_path, 2))
    console = Recorder()
    result = run.evaluate(plan, console)
    assert result is not None
    assert [line["job"] for line in result["scores"]] == ["gsm8k"]
    assert "left out: hendrycks_math500 needs the data set" in console.said[0]
    assert "hendrycks_math500 needs the data set" in report.write(result, tmp_path).read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("a", "a")}, "models must differ"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"data": Path("nowhere")}, "data folder 'nowhere' does not exist"),
        ({"settings": Settings(batch_size=0)}, "batch_size must be at least 1"),
        ({"jobs": (suites.Job("humaneval"),)}, "humaneval run programs .* give --run-code"),
        ({"models": ("/no/such/model",)}, "model folder '/no/such/model' does not exist"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any], message: str, models: tuple[str, str, str], tmp_path: Path
) -> None:
    jobs = (*suites.jobs("math", "greedy", [], ["gsm8k"]),)
    settings = {"models": models[:1], "jobs": jobs, "output": tmp_path / "out"}
    settings |= {"data": gsm8k(tmp_path, 1)}
    with pytest.raises(ValueError, match=message):
        run.evaluate(run.Plan(**{**settings, **changes}), Recorder())


def test_every_failed_question_is_in_the_report(
    models: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: Any, *_: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(transformers.GenerationMixin, "generate", breaks)
    jobs = (*suites.jobs("math", "greedy", [], ["gsm8k"]),)
    plan = run.Plan((models[0],), jobs, tmp_path / "out", data=gsm8k(tmp_path, 2))
    result = run.evaluate(plan, Recorder())
    assert result is not None
    assert result["scores"][0]["models"][models[0]]["failed"] == 2
    assert "failed: 2 of 2" in report.write(result, tmp_path).read_text()
