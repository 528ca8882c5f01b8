from __future__ import annotations

import re

import pytest

from iha.lab.report import verdict
from iha.lab.retrieval import Accuracy, RetrievalTask


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
