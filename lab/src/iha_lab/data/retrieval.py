"""Retrieval in the manner of RULER: many facts in a passage, then questions about some of them.

The paper's strongest claim is about tasks of this kind (RULER's needles among many keys). As in
RULER's hardest form, keys and values are both numbers: many keys share digits with the one asked
for, so the right fact is found only by all digits together. Keys are split once, by `seed`, into
those of the training passages and held-out ones: an evaluation asks for keys that no training
passage had.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, Literal

import torch

from iha_lab.data.examples import NO_LOSS, Example, batches, completed
from iha_lab.stats import Accuracy

Split = Literal["train", "held-out"]
Kind = Literal["multi-key", "multi-value", "multi-query", "variable-tracking"]
HELD_OUT = 0.25
FEW = 3  # values of one key, keys in one question
CHAIN = 4  # variables of one value


@dataclasses.dataclass(frozen=True)
class Question:
    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Passage:
    """Facts, and questions about them with their answers."""

    text: str
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class RetrievalTask:
    """`num_facts` facts a passage, of `digits` digits; everything follows from `seed`.

    kind                 a question asks for
    "multi-key"          the value of one key
    "multi-value"        all values of a key that has three, in the passage's order
    "multi-query"        the values of three keys
    "variable-tracking"  all variables of a value, where each is set to the one before it

    With `new_keys=False` the splits differ in their passages alone, not in their keys: for a model
    from nothing, to which a number that it never saw as a key means nothing.
    """

    num_facts: int = 16
    digits: int = 3
    seed: int = 0
    kind: Kind = "multi-key"
    new_keys: bool = True

    def __post_init__(self) -> None:
        if self.digits < 1:
            raise ValueError(f"digits must be at least 1, got {self.digits}.")
        most = len(self.keys("held-out"))
        least = {"multi-key": 1, "variable-tracking": CHAIN}.get(self.kind, FEW)
        if not least <= self.num_facts <= most:
            raise ValueError(
                f"num_facts must be between {least} and {most}, the keys of"
                f" {self.digits} digits that questions may be about; got {self.num_facts}."
            )

    @property
    def numbers(self) -> range:
        return range(10 ** (self.digits - 1), 10**self.digits)

    def keys(self, split: Split) -> list[int]:
        keys = list(self.numbers)
        random.Random(self.seed).shuffle(keys)
        if not self.new_keys:
            return keys
        held_out = round(HELD_OUT * len(keys))
        return keys[:held_out] if split == "held-out" else keys[held_out:]

    def passages(self, split: Split, count: int, questions: int = 1) -> list[Passage]:
        """The first `count` of an endless list that depends on the task and the split alone.

        A passage has `questions` questions, all of its keys may be asked for more than once.
        """
        chance = random.Random(f"{self.seed} {split}")
        keys = self.keys(split)
        make = {
            "multi-key": self._multi_key,
            "multi-value": self._multi_value,
            "multi-query": self._multi_query,
            "variable-tracking": self._variable_tracking,
        }[self.kind]
        return [make(chance, keys, questions) for _ in range(count)]

    def questions(self, split: Split, count: int) -> list[Question]:
        """One question a passage, the passage in its prompt."""
        return [
            Question(f"{passage.text} {question.prompt}", question.answer)
            for passage in self.passages(split, count)
            for question in passage.questions
        ]

    def _facts(self, chance: random.Random, keys: list[int], count: int) -> dict[int, int]:
        return {key: chance.choice(self.numbers) for key in chance.sample(keys, count)}

    def _multi_key(self, chance: random.Random, keys: list[int], questions: int) -> Passage:
        facts = self._facts(chance, keys, self.num_facts)
        asked = [chance.choice(list(facts)) for _ in range(questions)]
        return Passage(
            _written(list(facts.items())),
            tuple(
                Question(f"Question: what is key {key}? Answer: Key {key} is ", str(facts[key]))
                for key in asked
            ),
        )

    def _multi_value(self, chance: random.Random, keys: list[int], questions: int) -> Passage:
        facts = list(self._facts(chance, keys, self.num_facts).items())
        # Every run of FEW facts is about one key, its first.
        facts = [(facts[i - i % FEW][0], value) for i, (_, value) in enumerate(facts)]
        whole = {key for key, _ in facts[: len(facts) - len(facts) % FEW]}
        chance.shuffle(facts)
        asked = [chance.choice(sorted(whole)) for _ in range(questions)]
        return Passage(
            _written(facts),
            tuple(
                Question(
                    f"Question: what are all values of key {one}? Answer: Key {one} is ",
                    ", ".join(str(value) for key, value in facts if key == one),
                )
                for one in asked
            ),
        )

    def _multi_query(self, chance: random.Random, keys: list[int], questions: int) -> Passage:
        facts = self._facts(chance, keys, self.num_facts)
        asked = [chance.sample(list(facts), FEW) for _ in range(questions)]
        return Passage(
            _written(list(facts.items())),
            tuple(
                Question(
                    f"Question: what are keys {', '.join(map(str, some))}? Answer: They are ",
                    ", ".join(str(facts[key]) for key in some),
                )
                for some in asked
            ),
        )

    def _variable_tracking(self, chance: random.Random, keys: list[int], questions: int) -> Passage:
        names = chance.sample(keys, self.num_facts)
        chains = [names[i : i + CHAIN] for i in range(0, len(names), CHAIN)]
        values = chance.sample(self.numbers, len(chains))
        # Chains are mixed into each other; within one the order stays, so it can be followed.
        order = [i for i, chain in enumerate(chains) for _ in chain]
        chance.shuffle(order)
        position = [0] * len(chains)
        said: list[str] = []
        for i in order:
            name, before = chains[i][position[i]], chains[i][position[i] - 1]
            said.append(f"Var {name} is " + (f"var {before}." if position[i] else f"{values[i]}."))
            position[i] += 1
        asked = [chance.randrange(len(chains)) for _ in range(questions)]
        return Passage(
            " ".join(said),
            tuple(
                Question(
                    f"Question: which vars are {values[i]}? Answer: Vars ",
                    ", ".join(map(str, chains[i])),
                )
                for i in asked
            ),
        )


def _written(facts: list[tuple[int, int]]) -> str:
    return " ".join(f"Key {key} is {value}." for key, value in facts)


def examples(questions: list[Question], tokenizer: Any) -> list[Example]:
    """Tokens with a loss on the answer alone."""
    return [completed(tokenizer, question.prompt, question.answer) for question in questions]


def lessons(passages: list[Passage], tokenizer: Any) -> list[Example]:
    """A passage and all its questions in one sequence, with a loss on each answer."""
    found: list[Example] = []
    for passage in passages:
        lesson = completed(tokenizer, passage.text, "")
        for question in passage.questions:
            more = completed(tokenizer, f" {question.prompt}", question.answer)
            lesson["input_ids"] += more["input_ids"]
            lesson["labels"] += more["labels"]
        found.append(lesson)
    return found


def sized(task: RetrievalTask, tokenizer: Any, length: int, questions: int = 1) -> RetrievalTask:
    """The task with as many facts as fit into `length` tokens, questions and answers included.

    Raises ValueError where not even the fewest facts fit, or where the digits give too few keys.
    """

    def tokens(num_facts: int) -> int:
        # Numbers of as many digits, in one tokenizer, are of nearly one length; the first few tell.
        some = dataclasses.replace(task, num_facts=num_facts).passages("held-out", 4, questions)
        return max(len(lesson["input_ids"]) for lesson in lessons(some, tokenizer))

    low, high = CHAIN, len(task.keys("held-out"))
    if tokens(low) > length:
        raise ValueError(f"length must hold {low} facts, {tokens(low)} tokens; got {length}.")
    if tokens(high) < length - tokens(low):
        raise ValueError(
            f"length {length} is more than {high} facts fill ({tokens(high)} tokens), which have"
            f" all keys of {task.digits} digits that questions may be about; raise digits."
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(middle) <= length else (low, middle - 1)
    return dataclasses.replace(task, num_facts=low)


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
    correct = done = 0
    for batch in batches(examples(questions, tokenizer), batch_size, tokenizer):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        likeliest = model(**batch).logits[:, :-1].argmax(-1)
        right = (likeliest == labels) | (labels == NO_LOSS)
        correct += int(right.all(-1).sum())
        done += len(labels)
        progress(done)
    return Accuracy(correct, len(questions))
