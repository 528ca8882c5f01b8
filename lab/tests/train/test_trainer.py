"""What the training loop does to parameters; that it resumes is tested by the experiments."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from iha_lab import baselines
from iha_lab.train.trainer import SealingTrainer
from lab.tests.baselines.models import EVERY, llama


def test_mixing_does_not_decay_in_iha_or_in_a_baseline(tmp_path: Path) -> None:
    decaying: dict[str, set[str]] = {}
    for kind, attention in EVERY.items():
        model = baselines.equip(llama(num_hidden_layers=1), attention)
        trainer = SealingTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True))
        names = trainer.get_decay_parameter_names(model)
        assert "model.layers.0.self_attn.q_proj.weight" in names
        of_attention = [n.partition(".self_attn.")[2] for n in names if "_proj" not in n]
        decaying[kind] = {name for name in of_attention if name}
    assert {kind: found for kind, found in decaying.items() if found} == {
        "2-simplicial": {"baseline.key.weight", "baseline.value.weight"},
        "2-simplicial-windows": {"baseline.key.weight", "baseline.value.weight"},
        "dcmha": {"baseline.first.weight", "baseline.gates.weight"},
        "differential-v2": {"baseline.query.weight", "baseline.balance.weight"},
        "gated": {"baseline.gate.weight"},
        "gated-headwise": {"baseline.gate.weight"},
    }
