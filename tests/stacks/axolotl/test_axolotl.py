"""Axolotl trains with the plugin and the config of examples/axolotl.

Needs Axolotl, in an environment of its own: `make test-stacks`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import iha
import iha.hf
from tests.hf.families import tiny, trained
from tests.stacks.documents import documents, word_tokenizer, words

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
pytest.importorskip("axolotl")
pytestmark = pytest.mark.slow
SMALL = {
    "base_model": "./base",
    "sequence_len": 64,
    "micro_batch_size": 1,
    "max_steps": 1,
    "logging_steps": 1,
    "lr_scheduler": "constant",
    "save_strategy": "no",
    "dataset_prepared_path": "./prepared",
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    "bf16": False,
    "fp16": False,
    "tf32": False,
}
EXAMPLE = Path(__file__).parents[3] / "examples" / "axolotl"


def run(folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    """Train the model by the example's config on the documents; return the trainer."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    monkeypatch.setitem(sys.modules, "iha_axolotl", None)
    monkeypatch.delitem(sys.modules, "iha_axolotl")
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.chdir(folder)
    model.save_pretrained("base")
    word_tokenizer().save_pretrained("base")
    lines = [json.dumps({"text": words(document)}) for document in documents()]
    Path("data.jsonl").write_text("\n".join(lines))
    config = yaml.safe_load((EXAMPLE / "config.yaml").read_text()) | SMALL | settings
    Path("config.yaml").write_text(yaml.safe_dump(config))
    cfg = load_cfg("config.yaml")
    _, _, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    return trainer


def test_packed_documents_do_not_see_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained("llama")
    trainer = run(tmp_path, model, monkeypatch, adapter=None, learning_rate=0.0)
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == len(documents()) + 1  # and the padding
    with torch.no_grad():
        found = trainer.model.eval()(**batch).logits
        parts = batch["input_ids"].tensor_split(starts[1:], dim=1)
        expected = torch.cat([model(part).logits for part in parts], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_lora_and_the_mixing_train_and_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run(tmp_path, tiny("llama"), monkeypatch, max_steps=3)
    iha.check_optimizers(trainer.model, trainer.optimizer.optimizer)
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    mixing = {name: tensor for name, tensor in adapter.items() if "head_mixing" in name}
    assert len(mixing) == 3 * 4
    exact = torch.eye(4)
    moved = [not torch.equal(t[..., -1], exact) for n, t in mixing.items() if "alpha_q" in n]
    assert all(moved)


def test_other_attention_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="attn_implementation must be sdpa, got eager"):
        run(tmp_path, tiny("llama"), monkeypatch, attn_implementation="eager", sample_packing=False)
