"""Which tasks a suite has, and how the paper's protocols ask them."""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Sequence

from iha_lab.eval.compare import pass_at_k

# The needles of these lie in essays, which have to come from somewhere.
ESSAYS = (
    *("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"),
)
LONG = ("ruler_vt", "ruler_cwe")
RULER = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2"),
    *("niah_multikey_3", "niah_multivalue", "niah_multiquery", *LONG, "ruler_fwe"),
    *("ruler_qa_squad", "ruler_qa_hotpot"),
)
MATH = ("gsm8k", "minerva_math500")
CODE = ("mbpp", "humaneval")
SUITES = {"ruler": RULER, "math": MATH, "code": CODE, "paper": (*RULER, *MATH, *CODE)}
# hendrycks_math500 asks the same questions with no examples: for a choice by name.
KNOWN = (*SUITES["paper"], "hendrycks_math500")

METRICS = {"mbpp": "pass_at_1", "humaneval": "pass@1"}
# Two of the harness's rules of extraction: "strict-match" is the format that the examples of GSM8K
# show, "flexible-extract" the last number, for models that were tuned to answer otherwise.
RULES = {"gsm8k": "strict-match", "humaneval": "create_test"}


@dataclasses.dataclass(frozen=True)
class Pass:
    """Each question asked `samples` times; `math` and `code` are the scores of these suites."""

    samples: int = 1
    temperature: float = 0.0
    math: tuple[str, ...] = ("EM",)
    code: tuple[str, ...] = ("P@1",)
    gsm8k: str = RULES["gsm8k"]


PROTOCOLS = {
    # Each task as the harness defines it: one greedy answer, GSM8K with 5 examples.
    "greedy": (Pass(),),
    # The paper's for pretrained models: the same, and Maj@5 for GSM8K. At which temperature it
    # voted is not known to us; here it is that of the fine-tuned models.
    "pretrained": (Pass(), Pass(5, 0.6, math=("Maj@5",))),
    # The paper's for fine-tuned models: 16 samples at temperature 0.6.
    "finetuned": (Pass(16, 0.6, ("P@1", "Maj@16"), ("P@1", "P@10"), "flexible-extract"),),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One task of the harness, asked `samples` times; `labels` are the scores that it gives."""

    task: str
    length: int | None = None
    samples: int = 1
    temperature: float = 0.0
    labels: tuple[str, ...] = ("EM",)
    rule: str = "none"
    max_new_tokens: int | None = None

    @property
    def name(self) -> str:
        length = "" if self.length is None else f"@{self.length}"
        return f"{self.task}{length}" + (f"x{self.samples}" if self.samples > 1 else "")

    @property
    def runs_code(self) -> bool:
        return self.task in CODE

    @property
    def metric(self) -> str:
        """Which of the harness's scores of an answer counts."""
        return METRICS.get(self.task, "exact_match") if self.length is None else str(self.length)

    def scores(self, right: Sequence[float], extracted: Sequence[str]) -> dict[str, float]:
        """A question's scores, from how each of its answers scored and what was read out of it."""
        found: dict[str, float] = {}
        for label in self.labels:
            kind, _, count = label.partition("@")
            if kind == "P":
                found[label] = pass_at_k(len(right), round(sum(right)), int(count))
            elif kind == "Maj":  # the score of the answer that most samples gave
                winner = Counter(extracted).most_common(1)[0][0]
                found[label] = right[list(extracted).index(winner)]
            else:
                (found[label],) = right
        return found

    def extracted(self, response: str, filtered: str) -> str:
        """What a vote counts; for MATH the harness reads it out of a response as it scores."""
        with contextlib.suppress(Exception):  # of answers that cannot be read
            if self.task == "minerva_math500":
                from lm_eval.tasks.minerva_math import utils

                return utils.normalize_final_answer(utils.get_unnormalized_answer(response))
            if self.task == "hendrycks_math500":
                from lm_eval.tasks.hendrycks_math.utils import strip_string

                start, end = response.find("$"), response.rfind("$")
                return strip_string(response if start == end else response[start + 1 : end])
        return filtered


def jobs(
    suite: str,
    protocol: str,
    lengths: Sequence[int],
    tasks: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
) -> list[Job]:
    """The jobs of a suite, or of tasks by name; `max_new_tokens` shortens answers.

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
    for task in LONG:
        if task in chosen and min(lengths) < 1024:
            raise ValueError(
                f"lengths of {task} must be at least 1024, got {min(lengths)}: in less its example"
                " and question may not fit, and the harness would look for a fit forever."
            )
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    found: list[Job] = []
    for task in chosen:
        if task in RULER:
            found += [
                Job(task, length, labels=("match",), max_new_tokens=max_new_tokens)
                for length in lengths
            ]
            continue
        passes = PROTOCOLS[protocol]
        for asked in passes if task == "gsm8k" else passes[:1]:  # Table 2 votes on GSM8K alone
            labels = asked.code if task in CODE else asked.math
            rule = asked.gsm8k if task == "gsm8k" else RULES.get(task, "none")
            sampling = (asked.samples, asked.temperature, labels, rule, max_new_tokens)
            found.append(Job(task, None, *sampling))
    return found
