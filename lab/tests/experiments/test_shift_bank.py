from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import iha
from iha_lab.experiments import parse
from iha_lab.experiments.shift_bank import ShiftBank, ShiftBankRun

TINY: dict[str, Any] = {
    "experiment": "shift-bank",
    "attentions": [{"kind": "mha"}, {"kind": "iha", "pseudo_heads": 2}],
    "seeds": [0],
    "vocabulary": 4,
    "offsets": 3,
    "seq_len": 9,
    "hidden_size": 16,
    "num_heads": 2,
    "steps": 6,
    "batch_size": 2,
    "evaluate_every": 4,
    "questions": 8,
}


def runs(**changes: Any) -> list[ShiftBankRun]:
    sweep = parse(TINY | changes)
    assert isinstance(sweep, ShiftBank)
    return sweep.runs()


def test_the_answer_at_each_position_is_the_tokens_before_it() -> None:
    run = runs()[0]
    tokens, labels = run.batch(5, torch.Generator().manual_seed(0))
    K, N = run.sweep.offsets, run.sweep.seq_len
    assert labels.shape == (5, N - K, K)
    for position in range(K, N):
        for offset in range(1, K + 1):
            expected = tokens[:, position - offset]
            assert torch.equal(labels[:, position - K, offset - 1], expected)


def test_the_model_is_one_attention_layer_and_nothing_else() -> None:
    """Against the library's own layer with the same weights."""
    run = runs()[1]
    model, layer = run.model(), iha.InterleavedHeadAttention(16, 2, pseudo_heads=2, init="scratch")
    held = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "head_mixing"):
        getattr(layer, name).load_state_dict(getattr(held, name).state_dict())
    tokens, _ = run.batch(3, torch.Generator().manual_seed(0))
    expected = model.lm_head(layer(model.model.embed_tokens(tokens)))
    found = run.logits(model, tokens)
    torch.testing.assert_close(found.flatten(-2), expected[:, run.sweep.offsets :])


def test_attentions_of_a_seed_start_from_the_same_body() -> None:
    plain, mixed = (run.model().state_dict() for run in runs())
    assert plain.keys() < mixed.keys()
    assert all(torch.equal(plain[name], mixed[name]) for name in plain)


def test_the_mixing_has_a_rate_of_its_own() -> None:
    run = runs(mixing_rate=10.0, learning_rates=[0.01])[1]
    body, mixing = run.groups(run.model())
    assert (body["lr"], mixing["lr"]) == (0.01, pytest.approx(0.1))
    assert sum(p.numel() for p in mixing["params"]) == 4 * 2 * 2 * 2  # 4·H²·P
    plain = runs()[0]
    assert len(plain.groups(plain.model())) == 1


def test_a_run_is_repeatable_and_says_what_it_took(tmp_path: Path) -> None:
    first, again = (runs()[1].run(tmp_path, lambda *_: None) for _ in range(2))
    accuracies = first.notes["accuracy by offset"]
    assert accuracies == again.notes["accuracy by offset"]
    assert first.measures["accuracy"] == pytest.approx(sum(accuracies) / 3, abs=1e-4)
    steps = [step for step, _ in first.curves["CPU seconds over steps"]]
    assert steps == [4, 6]
    assert first.notes["training FLOPs of a step"] == 3 * 2 * first.cost["total_flops"]


def test_one_head_learns_one_offset(tmp_path: Path) -> None:
    """The smallest bank, solved: what is measured is what is learned."""
    (run,) = runs(
        attentions=[{"kind": "mha"}],
        offsets=1,
        steps=400,
        batch_size=32,
        evaluate_every=400,
        learning_rates=[0.03],
    )
    result = run.run(tmp_path, lambda *_: None)
    assert result.measures["offsets solved"] == 1
    assert result.measures["accuracy"] > 0.95
