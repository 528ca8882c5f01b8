"""TRL's trainers with a trained model: packed training, DPO and GRPO.

Needs TRL, in an environment of its own: `make test-stacks`.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import iha
from tests.hf.families import trained
from tests.stacks.documents import documents, loss_by_document, word_tokenizer, words

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.slow
QUIET: dict[str, Any] = {
    "max_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "bf16": False,
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(
    "packing",
    [
        {"packing": True, "packing_strategy": "bfd", "max_length": 16},
        {"padding_free": True, "max_length": None},
    ],
    ids=["bfd", "padding_free"],
)
# TRL recommends FlashAttention for both, since other attention may mix documents.
@pytest.mark.filterwarnings("ignore:.*[Pp]adding-free.*")
def test_packed_documents_do_not_see_each_other(
    family: str, packing: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = trained(family)
    expected = loss_by_document(model, documents())
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            str(tmp_path), per_device_train_batch_size=8, dataset_num_proc=None,
            learning_rate=0.0, **packing, **QUIET,
        ),
        train_dataset=Dataset.from_dict({"input_ids": documents()}),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert loss == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("reference", ["given", "reloaded"])
def test_the_first_dpo_loss_is_log_2(
    reference: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Policy and reference agree: a copy given to TRL, or what it loads where the model is from."""
    model = trained("llama")
    model.save_pretrained(tmp_path / "model")
    given: dict[str, Any] = {"ref_model": copy.deepcopy(model)}
    if reference == "reloaded":
        model, given = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), {}
    rows = [[words(part) for part in (d[:2], d[2:], d[:1:-1])] for d in documents()]
    columns = {
        name: [r[i] for r in rows] for i, name in enumerate(("prompt", "chosen", "rejected"))
    }
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(str(tmp_path / "run"), per_device_train_batch_size=4, **QUIET),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        **given,
    )
    trainer.train()
    loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert loss == pytest.approx(math.log(2), abs=1e-5)


def test_grpo_moves_the_mixing(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = trained("llama")
    before = [p.detach().clone() for p in iha.mixing_parameters(model)]

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [float(sum(ord(letter) for letter in text) % 7) for text in completions]

    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=trl.GRPOConfig(
            str(tmp_path), per_device_train_batch_size=4, num_generations=4, learning_rate=1e-2,
            max_completion_length=6, **QUIET,
        ),
        train_dataset=Dataset.from_dict({"prompt": [words(d[:4]) for d in documents()]}),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    after = iha.mixing_parameters(model)
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_the_example_runs(method: str, tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "examples" / "post_training.py"
    command = (sys.executable, script, method)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout
