"""Multi-key retrieval: many 'key is value' facts in a passage, then a question for one of them.

The paper's strongest claim is about tasks of this kind (RULER's needles among many keys). As in
RULER's hardest form, keys and values are both numbers: many keys share digits with the one asked
for, so the right fact is found only by all digits together. Keys are split once, by `seed`, into
those of the training passages and held-out ones: an evaluation asks for keys that no training
passage had.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any, Literal

import torch

from iha.lab.data import Example, batches

Split = Literal["train", "held-out"]
HELD_OUT = 0.25


@dataclasses.dataclass(frozen=True)
class Question:
    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class RetrievalTask:
    """`num_facts` facts a passage, of `digits` digits; everything follows from `seed`."""

    num_facts: int = 16
    digits: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.digits < 1:
            raise ValueError(f"digits must be at least 1, got {self.digits}.")
        most = len(self.keys("held-out"))
        if not 1 <= self.num_facts <= most:
            raise ValueError(
                f"num_facts must be between 1 and {most}, the held-out keys of {self.digits}"
                f" digits; got {self.num_facts}."
            )

    @property
    def _numbers(self) -> range:
        return range(10 ** (self.digits - 1), 10**self.digits)

    def keys(self, split: Split) -> list[int]:
        keys = list(self._numbers)
        random.Random(self.seed).shuffle(keys)
        held_out = round(HELD_OUT * len(keys))
        return keys[:held_out] if split == "held-out" else keys[held_out:]

    def questions(self, split: Split, count: int) -> list[Question]:
        """The first `count` of an endless list that depends on the task and the split alone."""
        chance = random.Random(f"{self.seed} {split}")
        keys = self.keys(split)
        return [self._question(chance, keys) for _ in range(count)]

    def _question(self, chance: random.Random, keys: list[int]) -> Question:
        facts = {key: chance.choice(self._numbers) for key in chance.sample(keys, self.num_facts)}
        asked = chance.choice(list(facts))
        passage = " ".join(f"Key {key} is {value}." for key, value in facts.items())
        question = f"Question: what is key {asked}? Answer: Key {asked} is "
        return Question(f"{passage} {question}", str(facts[asked]))


def examples(questions: list[Question], tokenizer: Any) -> list[Example]:
    """Tokens with a loss on the answer alone."""
    return [Example.of(tokenizer, question.prompt, question.answer) for question in questions]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """`correct` answers of `total`."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        return self.correct / self.total

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's score interval (1927), at 95 % by default: honest for small counts too."""
        n, p = self.total, self.value
        centre = p + z**2 / (2 * n)
        spread = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return (centre - spread) / (1 + z**2 / n), (centre + spread) / (1 + z**2 / n)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.value:.0%} ({low:.0%} to {high:.0%})"


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Any,
    questions: list[Question],
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> Accuracy:
    """How many answers are right to the last token: what greedy decoding would answer.

    One forward pass a question tells: an answer is decoded greedily exactly if each of its tokens
    is the likeliest after those before it.
    """
    model.eval()
    correct = 0
    for batch in batches(examples(questions, tokenizer), batch_size, tokenizer):
        labels = batch.pop("labels")[:, 1:]
        likeliest = model(**batch).logits[:, :-1].argmax(-1)
        right = (likeliest == labels) | (labels == -100)
        correct += int(right.all(-1).sum())
        progress(len(labels))
    return Accuracy(correct, len(questions))
