"""One model and one task through lm-eval: answers first, kept as they come, then scores."""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import torch
from lm_eval.models import huggingface
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor

from iha_lab import models
from iha_lab.eval.answers import Answers, Prompt, prompt
from iha_lab.eval.suites import Job
from iha_lab.eval.tasks import SEED, UNSCORED, quiet
from iha_lab.machine import default_device, processes, rank

HFLM: Any = huggingface.HFLM  # registered by a decorator that hides its class
Progress = Callable[[int, str], None]  # (answers there are, a word on how it goes)
Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How models run.

    `dtype` and `chat` make answers other ones: each has answers of its own. `batch_size` and
    `prefill_chunk` leave them as they are, up to rounding, sampled ones too.
    """

    dtype: torch.dtype = torch.float32
    batch_size: int = 8
    prefill_chunk: int | None = 256
    chat: bool = False


class _Answered(Exception):
    """This process has answered its share; the first one scores."""


class KeptLM(HFLM):
    """The harness's own class for Hugging Face models; answers are kept, and not asked for twice.

    `name` is what `iha_lab.models.load` takes. `sample` is the number of the answer that is asked
    for: a prompt has one greedy answer, and as many sampled ones as there are numbers.
    """

    def __init__(self, name: str, folder: Path, settings: Settings) -> None:
        self.settings = settings
        self.sample = 0
        self.progress: Progress = lambda done, note: None
        super().__init__(
            pretrained=name,
            backend="causal",
            batch_size=settings.batch_size,
            device=str(default_device()),
            # The harness cuts prompts that are longer than this, and a needle with them. Where a
            # model cannot go on so long, its question fails, and that is told.
            max_length=2**40,
        )
        # To the harness each process is the only one: its own shares would draw other examples for
        # a question with each number of processes.
        self._rank, self._world_size = 0, 1
        self.answers = Answers(folder, rank())
        self.set_cache_hook(self.answers)

    # The three steps in which the harness loads a model; the first does it our way.

    def _get_config(self, pretrained: str, **_: Any) -> None:
        with quiet():
            self._model, self.tokenizer = models.load(pretrained, self.settings.dtype)
        generation = self._model.generation_config
        generation.prefill_chunk_size = self.settings.prefill_chunk
        if generation.eos_token_id is None:  # or an answer would go on until its batch has ended
            generation.eos_token_id = self.tokenizer.eos_token_id
        self._config = self._model.config

    def _create_tokenizer(self, *_: Any, **__: Any) -> None:
        pass

    def _create_model(self, *_: Any, **__: Any) -> None:
        self._model.to(self.device)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        asked = [prompt(request.args[0], request.args[1], self.sample) for request in requests]
        share = list(zip(asked, requests, strict=True))[rank() :: processes()]
        missing = {  # equal prompts have one answer
            one.key: dataclasses.replace(request, arguments=(one, request.args[1]))
            for one, request in share
            if one.key not in self.answers.texts
        }
        for key in missing:
            self.answers.errors.pop(key, None)
        self._done = self.sample * len(share)
        self._tell(len(share) - len(missing))
        super().generate_until(list(missing.values()), disable_tqdm=True)
        self.wait()
        self.answers.read()  # what the others were given
        if rank() != 0:
            raise _Answered
        return [self.answers.texts.get(one.key, "") for one in asked]

    def wait(self) -> None:
        """Until all processes are here."""
        if hasattr(self, "accelerator"):
            self.accelerator.wait_for_everyone()

    def tok_batch_encode(self, strings: Sequence[Prompt], *args: Any, **options: Any) -> Any:
        self._batch = list(strings)  # the prompts that `_model_generate` gets next, as tokens
        return super().tok_batch_encode(strings, *args, **options)

    def _model_generate(
        self, context: Any, max_length: int, stop: Any, *, attention_mask: Any, **options: Any
    ) -> Any:
        """A batch that breaks is asked prompt by prompt; one that breaks alone has no answer."""
        batch = self._batch
        if options.get("do_sample"):
            options["custom_generate"] = functools.partial(sample, seeds=[p.seed for p in batch])
        try:
            found = super()._model_generate(
                context, max_length, stop, attention_mask=attention_mask, **options
            )
        except Exception as error:
            found, why = None, " ".join(f"{type(error).__name__}: {error}".split())[:500]
        if found is None and len(batch) > 1:
            torch.cuda.empty_cache()
            rows: list[Any] = []
            for index, one in enumerate(batch):
                self._batch, row = [one], slice(index, index + 1)
                mask = attention_mask[row]
                rows += self._model_generate(
                    context[row], max_length, stop, attention_mask=mask, **options
                )
            return pad_sequence(rows, True, self.tokenizer.pad_token_id)
        if found is None:
            self.answers.write({"key": batch[0].key, "error": why})  # pyright: ignore
        self._tell(len(batch))
        return context if found is None else found

    def _tell(self, more: int) -> None:
        self._done += more
        failed = len(self.answers.errors)
        self.progress(self._done * processes(), f"{failed} failed" if failed else "")


class _Seeded(LogitsProcessor):
    """Draws each sequence's token by a generator of its own, and leaves no other token.

    The largest of log p + Gumbel noise is distributed as p. So a sampled answer depends on its seed
    alone, not on what is in its batch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        waits = torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=one) for one in self.generators]
        )
        drawn = (scores.float() - waits.to(scores.device).log()).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


def sample(model: Any, input_ids: Any, logits_processor: Any, seeds: Any, **options: Any) -> Any:
    """transformers' own sampling, after its own temperature and cut-offs, with a seed for each."""
    logits_processor.append(_Seeded(seeds))
    return model._sample(input_ids, logits_processor=logits_processor, **options)


def run(
    model: KeptLM, job: Job, task: Any, limit: int | None, progress: Progress
) -> list[dict[str, Any]]:
    """A row for each question: what was asked, answered, and how each score came out.

    The harness's own task is asked once for each sample. A question that broke, while it was
    answered or scored, has an empty answer or scores of 0, and says why under "failed". Processes
    other than the first get no rows.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    rows: dict[int, dict[str, Any]] = {}
    model.progress = progress
    for number in range(job.samples):
        model.sample = number
        task.set_fewshot_seed(SEED)  # examples are drawn anew each time: always the same
        with quiet(), contextlib.suppress(_Answered):
            found: Any = lm_eval.evaluator.evaluate(
                model,
                {"tasks": {job.task: task}},
                limit=limit,
                bootstrap_iters=0,  # the intervals are ours
                apply_chat_template=model.settings.chat,
                fewshot_as_multiturn=model.settings.chat,
                confirm_run_unsafe_code=job.runs_code,  # whoever got here has allowed it
            )
            _add(rows, job, number, found["samples"][job.task], model.answers)
    for row in rows.values():
        row["scores"] = job.scores(row["scores"], row.pop("extracted"))
    return [rows[number] for number in sorted(rows)]


def _add(
    rows: dict[int, dict[str, Any]], job: Job, number: int, samples: Any, answers: Answers
) -> None:
    """One sample of each question."""
    for answered in samples:
        if answered["filter"] != job.rule:
            continue
        text, settings = answered["arguments"][0]
        asked = {"id": answered["doc_id"], "prompt": text, "target": answered["target"]}
        lists: dict[str, Any] = {"answers": [], "extracted": [], "scores": [], "failed": None}
        row = rows.setdefault(answered["doc_id"], asked | lists)
        (response,) = answered["resps"][0]
        row["answers"].append(response)
        row["extracted"].append(job.extracted(response, answered["filtered_resps"][0]))
        row["scores"].append(float(answered.get(job.metric, 0.0)))
        failed = answers.errors.get(prompt(text, settings, number).key)
        if failed is None and UNSCORED in answered:
            failed = "the answer could not be scored"
        row["failed"] = row["failed"] or failed
