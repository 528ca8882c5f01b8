"""Which tasks a suite has, and the paper's protocols as settings of the harness's tasks."""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

RULER = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
    "ruler_qa_squad",
    "ruler_qa_hotpot",
)
# Their needles lie in essays, which have to come from somewhere; other haystacks are generated.
ESSAYS = frozenset(
    ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
)
LONG = frozenset(("ruler_vt", "ruler_cwe"))
MATH = ("gsm8k", "minerva_math500")
CODE = ("mbpp", "humaneval")
SUITES = {"ruler": RULER, "math": MATH, "code": CODE, "paper": (*RULER, *MATH, *CODE)}

# hendrycks_math500 asks the same questions with no examples: for a choice by name.
KNOWN = (*SUITES["paper"], "hendrycks_math500")
RUNS_CODE = frozenset(CODE)

# The harness's own rules of extraction for GSM8K: "strict-match" is the format that five examples
# show, "flexible-extract" the last number, for models that were tuned to answer otherwise.
STRICT, FLEXIBLE, WHOLE = "strict-match", "flexible-extract", "none"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a task is asked: each (samples, temperature) is one pass over its questions."""

    passes: tuple[tuple[int, float], ...]
    shots: int | None = None
    gsm8k: str = STRICT
    code_k: tuple[int, ...] = (1,)


PROTOCOLS = {
    # Each task as the harness defines it: one greedy answer.
    "greedy": Protocol(((1, 0.0),)),
    # The paper's for pretrained models: 5 examples, exact match; Maj@5 for GSM8K. At which
    # temperature it voted is not known to us; here it is that of the fine-tuned models.
    "pretrained": Protocol(((1, 0.0), (5, 0.6)), shots=5),
    # The paper's for fine-tuned models: 16 samples at temperature 0.6.
    "finetuned": Protocol(((16, 0.6),), gsm8k=FLEXIBLE, code_k=(1, 10)),
}


@dataclasses.dataclass(frozen=True)
class Score:
    """One figure of a table: the mean over `filters` of a metric of the harness."""

    label: str
    metric: str
    filters: tuple[str, ...] = (WHOLE,)


@dataclasses.dataclass(frozen=True)
class Job:
    """One pass over one task of the harness."""

    task: str
    length: int | None = None
    samples: int = 1
    temperature: float = 0.0
    shots: int | None = None
    gsm8k: str = STRICT
    code_k: tuple[int, ...] = (1,)
    max_new_tokens: int | None = None

    @property
    def name(self) -> str:
        length = "" if self.length is None else f"@{self.length}"
        return f"{self.task}{length}" + (f"x{self.samples}" if self.samples > 1 else "")

    @property
    def runs_code(self) -> bool:
        return self.task in RUNS_CODE

    @property
    def scores(self) -> tuple[Score, ...]:
        if self.length is not None:
            return (Score("match", str(self.length)),)
        if self.runs_code:
            where = "create_test" if self.task == "humaneval" else WHOLE
            name = "pass_at_1" if self.task == "mbpp" and self.samples == 1 else None
            return tuple(Score(f"P@{k}", name or f"pass@{k}", (where,)) for k in self.code_k)
        if self.samples == 1:
            filters = (self.gsm8k if self.task == "gsm8k" else WHOLE,)
            return (Score("EM", "exact_match", filters),)
        each = tuple(sample_name(index) for index in range(self.samples))
        majority = Score(f"Maj@{self.samples}", "exact_match", (MAJORITY,))
        return (Score("P@1", "exact_match", each), majority) if self.shots is None else (majority,)

    def overrides(self, config: Any) -> dict[str, Any]:
        """What has to differ from the task's own `config` (lm-eval's TaskConfig)."""
        found: dict[str, Any] = {}
        if self.shots is not None and self.task == "gsm8k":
            found["num_fewshot"] = self.shots
        generation: dict[str, Any] = {}
        if self.max_new_tokens is not None:
            generation["max_gen_toks"] = self.max_new_tokens
        if self.samples > 1:
            generation |= {"do_sample": True, "temperature": self.temperature}
        if generation:
            found["generation_kwargs"] = {**config.generation_kwargs, **generation}
        if self.samples == 1:
            return found
        found["repeats"] = self.samples
        if self.runs_code:
            return {**found, **self._code(config)}
        return {**found, "filter_list": self._votes(config)}

    def _code(self, config: Any) -> dict[str, Any]:
        # HumanEval's metric of the harness takes any k and any number of programs; MBPP's is the
        # same with k = 1, so MBPP is scored by HumanEval's.
        from lm_eval.tasks.humaneval.utils import pass_at_k

        metric = {"metric": pass_at_k, "aggregation": "mean", "higher_is_better": True}
        found: dict[str, Any] = {"metric_list": [{**metric, "k": list(self.code_k)}]}
        if config.filter_list is None:  # the harness's default keeps the first program alone
            every = {"function": "take_first_k", "k": self.samples}
            found["filter_list"] = [{"name": WHOLE, "filter": [every]}]
        return found

    def _votes(self, config: Any) -> list[dict[str, Any]]:
        """A filter for each sample by itself, and one for the majority's answer."""
        first = {"function": "take_first"}
        if self.task == "gsm8k":
            (own,) = [entry for entry in config.filter_list if entry["name"] == self.gsm8k]
            extract = own["filter"][:-1]
            vote = [*extract, {"function": "majority_vote"}, first]
        else:
            # The harness extracts these answers while it scores; the vote needs them before.
            extract = []
            vote = [_custom(functools.partial(vote_by, answer_of(self.task))), first]
        each = [
            {
                "name": sample_name(i),
                "filter": [_custom(functools.partial(nth, i)), *extract, first],
            }
            for i in range(self.samples)
        ]
        return [*each, {"name": MAJORITY, "filter": vote}]


MAJORITY = "majority"


def sample_name(index: int) -> str:
    return f"sample {index + 1}"


def _custom(function: Callable[..., Any]) -> dict[str, Any]:
    return {"function": "custom", "filter_fn": function}


def nth(index: int, responses: Sequence[Sequence[str]], docs: object) -> list[list[str]]:
    """Keep the one response of that index."""
    return [[given[index]] for given in responses]


def vote_by(
    answer: Callable[[str], str], responses: Sequence[Sequence[str]], docs: object
) -> list[list[str]]:
    """Keep the first response whose extracted answer is the most frequent one."""

    def winner(given: Sequence[str]) -> str:
        answers = [answer(response) for response in given]
        most = Counter(answers).most_common(1)[0][0]
        return given[answers.index(most)]

    return [[winner(given)] for given in responses]


def answer_of(task: str) -> Callable[[str], str]:
    """How the harness reads an answer out of a response to a MATH problem."""
    if task == "minerva_math500":
        from lm_eval.tasks.minerva_math import utils

        return lambda text: utils.normalize_final_answer(utils.get_unnormalized_answer(text))
    from lm_eval.tasks.hendrycks_math.utils import strip_string

    def between_dollars(text: str) -> str:
        start, end = text.find("$"), text.rfind("$")
        return strip_string(text if start == end else text[start + 1 : end])

    return between_dollars


def jobs(
    suite: str,
    protocol: str,
    lengths: Sequence[int],
    tasks: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
) -> list[Job]:
    """The passes of a suite, or of tasks by name; `max_new_tokens` shortens answers.

    Each length is a job of its own: the harness counts a limit over all lengths together.
    """
    for name, value, choices in (("suite", suite, SUITES), ("protocol", protocol, PROTOCOLS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
    chosen = SUITES[suite] if tasks is None else tasks
    for task in chosen:
        if task not in KNOWN:
            raise ValueError(f"task must be one of {', '.join(KNOWN)}; got {task!r}.")
    if any(length < 1 for length in lengths):
        raise ValueError(f"lengths must be positive numbers of tokens, got {list(lengths)}.")
    for task in set(chosen) & LONG:
        if min(lengths) < 1024:
            raise ValueError(
                f"lengths of {task} must be at least 1024, got {min(lengths)}: in less its example"
                " and question may not fit, and the harness would look for a fit forever."
            )
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    asked = PROTOCOLS[protocol]
    found: list[Job] = []
    for task in chosen:
        if task in RULER:
            found += [Job(task, length, max_new_tokens=max_new_tokens) for length in lengths]
            continue
        # Table 2 has a vote for GSM8K alone.
        passes = asked.passes if task == "gsm8k" else asked.passes[:1]
        for samples, temperature in passes:
            settings = (samples, temperature, asked.shots, asked.gsm8k, asked.code_k)
            found.append(Job(task, None, *settings, max_new_tokens=max_new_tokens))
    return found
