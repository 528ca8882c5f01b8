from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch

from iha_lab.data.examples import NO_LOSS
from iha_lab.experiments import parse
from iha_lab.experiments.recall import RecallRun

TINY: dict[str, Any] = {
    "experiment": "recall",
    "attentions": [{"kind": "mha"}, {"kind": "iha", "pseudo_heads": 2, "rope": "token"}],
    "seeds": [0],
    "symbols": 5,
    "side": 2,
    "longer": [3],
    "hidden_size": 16,
    "num_heads": 2,
    "steps": 6,
    "batch_size": 2,
    "evaluate_every": 4,
    "questions": 8,
}


def runs(**changes: Any) -> list[RecallRun]:
    return parse(TINY | changes).runs()


@pytest.mark.parametrize("side", [2, 4])
def test_a_value_is_asked_where_its_pair_stands_again(side: int) -> None:
    tokens, labels = runs()[0].batch(6, torch.Generator().manual_seed(0), side)
    assert tokens.shape == labels.shape == (6, 6 * side**2)
    for sequence, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
        facts = {}
        for i in range(0, len(sequence), 3):
            a, b, value = sequence[i : i + 3]
            assert a < 5 <= b < 10 <= value < 15
            again = i >= len(sequence) // 2
            assert asked[i : i + 3] == [NO_LOSS, value if again else NO_LOSS, NO_LOSS]
            if again:
                assert facts.pop((a, b)) == value
            else:
                facts[a, b] = value
                assert len(facts) == i // 3 + 1
        assert not facts


def test_one_token_of_a_key_does_not_tell_the_fact() -> None:
    tokens, _ = runs()[0].batch(6, torch.Generator().manual_seed(0))
    for sequence in tokens[:, : tokens.shape[1] // 2].tolist():
        for part in (sequence[0::3], sequence[1::3]):
            assert sorted(map(part.count, {*part})) == [2, 2]


def test_a_run_is_repeatable_and_tests_longer_sequences(tmp_path: Path) -> None:
    first, again = (runs()[1].run(tmp_path, lambda *_: None) for _ in range(2))
    accuracies = [name for name in first.measures if name.startswith("accuracy")]
    assert accuracies == ["accuracy at 24 tokens", "accuracy at 54 tokens"]
    assert all(first.measures[name] == again.measures[name] for name in accuracies)


def test_the_smallest_task_is_learned(tmp_path: Path) -> None:
    """Two values and one fact: to copy what stands three tokens before."""
    (run,) = runs(
        attentions=[{"kind": "mha"}],
        symbols=2,
        side=1,
        longer=[],
        steps=300,
        batch_size=32,
        evaluate_every=300,
        learning_rates=[0.01],
    )
    assert run.run(tmp_path, lambda *_: None).measures["accuracy at 6 tokens"] > 0.95


def test_a_grid_needs_as_many_symbols() -> None:
    with pytest.raises(pydantic.ValidationError, match="symbols = 5"):
        runs(longer=[6])
