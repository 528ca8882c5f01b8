from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iha_lab.data.examples import NO_LOSS
from iha_lab.data.retrieval import RetrievalTask
from iha_lab.experiments import parse
from iha_lab.experiments.retrieval import FEWEST, RetrievalRun, word_tokenizer

TINY: dict[str, Any] = {
    "experiment": "retrieval",
    "attentions": [{"kind": "mha"}],
    "seeds": [0],
    "start": {"num_layers": 1, "hidden_size": 16, "num_heads": 2},
    "digits": 2,
    "train_length": 48,
    "test_lengths": [48, 96],
    "questions_per_passage": 2,
    "questions": 8,
    "steps": 3,
    "batch_size": 4,
}


def tiny(**changes: Any) -> RetrievalRun:
    run = parse(TINY | changes).only_run()
    assert isinstance(run, RetrievalRun)
    return run


@pytest.mark.parametrize("kind", ["multi-key", "multi-value", "multi-query", "variable-tracking"])
def test_the_words_of_every_kind_are_in_the_vocabulary(kind: Any) -> None:
    tokenizer = word_tokenizer(2)
    for question in RetrievalTask(num_facts=8, digits=2, kind=kind).questions("train", 5):
        tokens = tokenizer(question.prompt + question.answer)["input_ids"]
        assert tokenizer.unk_token_id not in tokens
        assert tokenizer.decode(tokens).split()[-1] == question.answer.split()[-1]


def test_lessons_fill_their_length_and_teach_every_answer() -> None:
    run = tiny()
    _, tokenizer = run.model()
    task = RetrievalTask(digits=2, new_keys=False)
    found = run.lessons(task, tokenizer, 40)
    assert len(found) == 40
    assert found == run.lessons(task, tokenizer, 40)
    facts = [tokenizer.decode(row["input_ids"]).split(" Question")[0].count(".") for row in found]
    assert min(facts) == FEWEST
    assert 48 - 12 < max(len(row["input_ids"]) for row in found) <= 48
    for row in found:
        learned = [token for token in row["labels"] if token != NO_LOSS]
        assert len(learned) == 2  # a number is a token here, and two questions are asked


def test_a_run_says_how_well_it_does_at_each_length(tmp_path: Path) -> None:
    told: list[str] = []
    result = tiny().run(tmp_path, lambda done, total, note: told.append(f"{done}/{total} {note}"))
    assert set(result.measures) == {"accuracy at 48 tokens", "accuracy at 96 tokens"}
    assert all(0 <= value <= 1 for value in result.measures.values())
    assert [x for x, _ in result.curves["accuracy over tokens"]] == [48, 96]
    assert result.notes["steps"] == 3
    assert told[0].startswith("1/3 loss")


def test_equal_flops_give_the_cheaper_attention_more_steps(tmp_path: Path) -> None:
    other = {"kind": "iha", "pseudo_heads": 4}
    plain = tiny(flops_of=other, steps=20)
    mixed = tiny(flops_of=other, steps=20, attentions=[other])
    from iha_lab import baselines

    costs = [
        baselines.cost(baselines.equip(run.model()[0], run.attention, 48), 48).total_flops
        for run in (plain, mixed)
    ]
    assert costs[1] > costs[0]
    assert plain.steps(costs[0]) == round(20 * costs[1] / costs[0]) > 20
    assert mixed.steps(costs[1]) == 20
