from __future__ import annotations

import re

import pytest

from iha_lab.data.examples import NO_LOSS
from iha_lab.data.retrieval import Accuracy, Kind, RetrievalTask, examples, lessons, sized
from iha_lab.experiments.retrieval import word_tokenizer
from iha_lab.report.quickstart_page import verdict


def test_held_out_keys_are_in_no_training_passage() -> None:
    task = RetrievalTask(num_facts=8, seed=5)
    held_out, train = (set(task.keys(split)) for split in ("held-out", "train"))
    assert not held_out & train
    assert held_out | train == set(range(100, 1000))
    for split, keys in (("held-out", held_out), ("train", train)):
        for question in task.questions(split, 30):
            found = re.findall(r"Key (\d+) is \d", question.prompt)
            assert len(set(found)) == 8
            assert {int(key) for key in found} <= keys


def test_the_answer_is_in_the_passage_and_belongs_to_the_key() -> None:
    for question in RetrievalTask(num_facts=12, digits=2, seed=1).questions("train", 30):
        facts = dict(re.findall(r"Key (\d+) is (\d+)\.", question.prompt))
        asked = re.search(r"what is key (\d+)\?", question.prompt)
        assert asked is not None
        assert len(facts) == 12
        assert facts[asked[1]] == question.answer
        assert question.prompt.endswith(f"Answer: Key {asked[1]} is ")


def test_everything_follows_from_the_seed() -> None:
    first, again, other = (RetrievalTask(seed=seed).questions("train", 5) for seed in (0, 0, 1))
    assert first == again != other
    assert RetrievalTask().questions("train", 9)[:5] == RetrievalTask().questions("train", 5)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Wilson's intervals as tabulated in Brown, Cai and DasGupta (2001) and by hand.
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert Accuracy(correct, total).interval() == pytest.approx((low, high), abs=2e-4)


def test_the_verdict_claims_no_more_than_the_intervals() -> None:
    assert "overlap: a run this short" in verdict(Accuracy(50, 96), Accuracy(60, 96))
    assert "the IHA model is better" in verdict(Accuracy(10, 96), Accuracy(90, 96))
    assert "the plain model is better" in verdict(Accuracy(90, 96), Accuracy(10, 96))


@pytest.mark.parametrize("settings", [{"num_facts": 0}, {"num_facts": 226}, {"digits": 0}])
def test_bad_sizes(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        RetrievalTask(**settings)


def test_multi_value_asks_for_all_values_in_order() -> None:
    for question in RetrievalTask(num_facts=11, seed=2, kind="multi-value").questions("train", 20):
        facts = re.findall(r"Key (\d+) is (\d+)\.", question.prompt)
        asked = re.search(r"all values of key (\d+)\?", question.prompt)
        assert asked is not None
        assert len(facts) == 11
        values = [value for key, value in facts if key == asked[1]]
        assert len(values) == 3
        assert question.answer == ", ".join(values)


def test_multi_query_asks_for_three_keys_in_its_own_order() -> None:
    for question in RetrievalTask(num_facts=9, kind="multi-query").questions("held-out", 20):
        facts = dict(re.findall(r"Key (\d+) is (\d+)\.", question.prompt))
        asked = re.search(r"what are keys (\d+), (\d+), (\d+)\?", question.prompt)
        assert asked is not None
        assert question.answer == ", ".join(facts[key] for key in asked.groups())


def test_variable_tracking_follows_chains_through_each_other() -> None:
    mixed = 0
    for question in RetrievalTask(num_facts=12, kind="variable-tracking").questions("train", 20):
        value: dict[str, str] = {}
        for name, copied, given in re.findall(
            r"Var (\d+) is (?:var (\d+)|(\d+))\.", question.prompt
        ):
            value[name] = value[copied] if copied else given  # KeyError: used before it is set
        asked = re.search(r"which vars are (\d+)\?", question.prompt)
        assert asked is not None
        assert len(value) == 12
        answer = [name for name, of in value.items() if of == asked[1]]
        assert len(answer) == 4
        assert question.answer == ", ".join(answer)
        names = list(value)
        mixed += names.index(answer[-1]) - names.index(answer[0]) > 3
    assert mixed > 10


def test_several_questions_a_passage_and_a_loss_on_each_answer() -> None:
    task = RetrievalTask(num_facts=5)
    (passage,) = task.passages("train", 1, questions=3)
    assert len(passage.questions) == 3
    assert task.questions("train", 1)[0].prompt.startswith(passage.text)
    tokenizer = word_tokenizer(3)
    (lesson,) = lessons([passage], tokenizer)
    asked = " ".join(f"{question.prompt}{question.answer}" for question in passage.questions)
    assert lesson["input_ids"] == tokenizer(f"{passage.text} {asked}")["input_ids"]
    answers = [question.answer for question in passage.questions]
    learned = [token for token in lesson["labels"] if token != NO_LOSS]
    assert tokenizer.decode(learned).split() == answers


def test_without_new_keys_only_passages_differ() -> None:
    task = RetrievalTask(new_keys=False)
    assert set(task.keys("train")) == set(task.keys("held-out")) == set(range(100, 1000))
    assert task.questions("train", 3) != task.questions("held-out", 3)


@pytest.mark.parametrize("kind", ["multi-key", "multi-value", "multi-query", "variable-tracking"])
def test_a_length_in_tokens_is_filled_and_not_passed(kind: Kind) -> None:
    tokenizer = word_tokenizer(3)
    task = sized(RetrievalTask(kind=kind), tokenizer, 300)
    asked = examples(task.questions("held-out", 20), tokenizer)
    assert all(300 - 12 < len(example["input_ids"]) <= 300 for example in asked)
    with pytest.raises(ValueError, match=r"length must hold 4 facts, .* got 10"):
        sized(task, tokenizer, 10)
    with pytest.raises(ValueError, match="raise digits"):
        sized(task, tokenizer, 5000)
