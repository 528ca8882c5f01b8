"""One model and one task through lm-eval: answers first, kept as they come, then scores."""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import torch
from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from iha_lab import models
from iha_lab.eval.answers import Answers, keys
from iha_lab.eval.suites import Job
from iha_lab.eval.tasks import SEED, quiet

Progress = Callable[[int, str], None]  # (questions done, a word on how it goes)
Request = tuple[str, dict[str, Any]]
UNSCORED = "unscored"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How models run; all but `dtype` leave the answers as they are, up to rounding."""

    dtype: torch.dtype = torch.float32
    batch_size: int = 8
    prefill_chunk: int | None = 256
    chat: bool = False


class _Answered(Exception):
    """This process has done its share; the first one scores."""


class KeptLM(LM):
    """A language model of the harness whose answers are kept, and never asked for twice.

    `name` is what `iha_lab.models.load` takes; it is loaded when the first answer is missing. Under
    `accelerate launch` each process answers its share of the batches.
    """

    def __init__(self, name: str, folder: Path, settings: Settings) -> None:
        super().__init__()
        self.name = name
        self.settings = settings
        self.processes = PartialState(cpu=not torch.accelerator.is_available())
        self.answers = Answers(folder, self.processes.process_index)
        self.progress: Progress = lambda done, note: None

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        """(model on its device, tokenizer)."""
        with quiet():
            model, tokenizer = models.load(self.name, self.settings.dtype)
        model.generation_config.prefill_chunk_size = self.settings.prefill_chunk
        return model.to(self.processes.device), tokenizer

    @functools.cached_property
    def runner(self) -> Any:
        """The harness's way to run a model.

        It would cut prompts that the model's context is too short for, and a needle with them; so
        the context is given as endless.
        """
        model, tokenizer = self.loaded
        build: Any = HFLM  # registered by a decorator that hides its signature
        return build(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=self.settings.batch_size,
            max_length=2**40,
        )

    def unload(self) -> None:
        """Give the model's memory back; a question that is still to be asked loads it again."""
        for name in {"loaded", "runner"} & set(vars(self)):
            delattr(self, name)
        torch.cuda.empty_cache()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        asked: list[Any] = [request.args for request in requests]
        known = keys(asked)
        self._answer(asked, known)
        if not self.processes.is_main_process:
            raise _Answered
        return [self.answers.texts.get(key, "") for key in known]

    def _answer(self, asked: list[Request], known: list[str]) -> None:
        """Answer what has no answer yet, long prompts first: time left is over-, not underrated."""
        order = sorted(range(len(asked)), key=lambda index: -len(asked[index][0]))
        size = self.settings.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        share = batches[self.processes.process_index :: self.processes.num_processes]
        if any(key not in self.answers.texts for key in known):
            _ = self.runner  # a model that cannot be loaded is no matter of single questions
        done = 0
        for batch in share:
            missing = [index for index in batch if known[index] not in self.answers.texts]
            if missing:
                self._batch([asked[i] for i in missing], [known[i] for i in missing])
            done += len(batch)
            failed = sum(known[index] in self.answers.errors for index in order)
            everywhere = min(done * self.processes.num_processes, len(asked))
            self.progress(everywhere, f"{failed} failed" if failed else "")
        self.processes.wait_for_everyone()
        self.answers.read()

    def _batch(self, asked: list[Request], known: list[str]) -> None:
        """Answers of a batch; if it breaks, of each question by itself."""
        try:
            texts = self._generate(asked, known)
        except Exception as error:
            if len(asked) > 1:
                for request, key in zip(asked, known, strict=True):
                    self._batch([request], [key])
                return
            reason = f"{type(error).__name__}: {error}"
            self.answers.add([{"key": known[0], "error": " ".join(reason.split())[:500]}])
            torch.cuda.empty_cache()
            return
        rows = zip(known, texts, strict=True)
        self.answers.add({"key": key, "text": text} for key, text in rows)

    def _generate(self, asked: list[Request], known: list[str]) -> list[str]:
        # Sampled answers depend on their questions alone, not on what ran before.
        torch.manual_seed(int(hashlib.sha256("".join(known).encode()).hexdigest()[:15], 16))
        instances = [
            Instance("generate_until", doc={}, arguments=request, idx=0) for request in asked
        ]
        return self.runner.generate_until(instances, disable_tqdm=True)

    def loglikelihood(self, requests: list[Instance]) -> Any:
        raise NotImplementedError("the suites ask for generated answers alone")

    loglikelihood_rolling = loglikelihood

    @property
    def tokenizer_name(self) -> str:
        return self.runner.tokenizer_name

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.runner.apply_chat_template(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.runner.chat_template(chat_template)


def run(
    model: KeptLM, job: Job, task: Any, limit: int | None, progress: Progress
) -> list[dict[str, Any]]:
    """A row for each question: what was asked, answered, and how each score came out.

    A question that broke, while it was answered or scored, has an empty answer or scores of 0, and
    says why under "failed". Processes other than the first get no rows.
    """
    model.progress = progress
    _tolerate(task)
    task.set_fewshot_seed(SEED)  # each run draws the examples anew: all models see the same
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with quiet():
            found: Any = lm_eval.evaluator.evaluate(
                model,
                {"tasks": {job.task: task}},
                limit=limit,
                bootstrap_iters=0,  # the intervals are ours
                apply_chat_template=model.settings.chat,
                fewshot_as_multiturn=model.settings.chat,
                confirm_run_unsafe_code=job.runs_code,  # whoever got here has allowed it
            )
    except _Answered:
        return []
    rows: dict[int, dict[str, Any]] = {}
    asked: list[Request] = []
    for sample in found["samples"][job.task]:
        number = sample["doc_id"]
        if number not in rows:
            answers = sample["resps"][0]
            asked += [sample["arguments"][0]] * len(answers)
            rows[number] = {
                "id": number,
                "prompt": sample["arguments"][0][0],
                "target": sample["target"],
                "answers": answers,
                "scores": {},
                "failed": None,
            }
        scores = {metric: float(sample[metric]) for metric in sample["metrics"]}
        rows[number]["scores"][sample["filter"]] = scores
        if UNSCORED in scores:
            rows[number]["failed"] = "the answer could not be scored"
    known = iter(keys(asked))
    for row in rows.values():
        errors = [model.answers.errors.get(next(known)) for _ in row["answers"]]
        row["failed"] = next(filter(None, errors), row["failed"])
    return list(rows.values())


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
