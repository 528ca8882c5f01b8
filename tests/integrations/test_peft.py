"""IHA as an adapter: only its own tensors, off and on, saved, loaded and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import iha
from iha.integrations.peft import IhaConfig
from tests.hf.families import inputs, tiny

FAMILIES = ("llama", "gemma2", "gpt_neox")


def base(family: str, folder: Path) -> Any:
    """A plain model, loaded as a user has it: by name."""
    tiny(family).save_pretrained(folder)
    attention = "eager" if family == "gemma2" else "sdpa"  # which leaves out the soft-cap
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


def adapted(model: Any, **options: Any) -> Any:
    """With an adapter whose tensors are as after training."""
    model = get_peft_model(model, IhaConfig(task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model: Any, family: str) -> torch.Tensor:
    """Of the tokens that are none of the padding."""
    given = inputs(family)
    return model(**given).logits[given["attention_mask"].bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_exactly_and_trains_the_mixing_alone(family: str, tmp_path: Path) -> None:
    model = base(family, tmp_path)
    before = logits(model, family)
    model = get_peft_model(model, IhaConfig(pseudo_heads=3, task_type="CAUSAL_LM")).eval()
    torch.testing.assert_close(logits(model, family), before, atol=1e-5, rtol=1e-4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".head_mixing." in name for name in trained)
    model(**inputs(family)).logits.square().sum().backward()
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)


def test_smollm2s_adapter_has_21600_numbers() -> None:
    H, G, P, layers = 9, 3, 4, 30
    mixing = iha.HeadMixing(H, num_kv_heads=G, pseudo_heads=P, init="upcycle")
    assert layers * sum(p.numel() for p in mixing.parameters()) == 21_600


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"pseudo_queries": 1, "layers": [1], "causal": "token"}])
def test_off_it_is_the_base_and_on_again_itself(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = base(family, tmp_path)
    before = logits(model, family)
    model = adapted(model, pseudo_heads=3, **options)
    on = logits(model, family)
    assert (on - before).abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, family), before, atol=1e-5, rtol=1e-4)
    assert torch.equal(logits(model, family), on)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_loaded_and_merged_it_is_the_same(family: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"pseudo_heads": {0: 3, 1: 2}}
    if family != "gemma2":
        options["rope"] = "fractional"
    model = adapted(base(family, tmp_path / "base"), **options)
    expected = logits(model, family)
    model.save_pretrained(tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in model.parameters() if p.requires_grad) + 2000

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(logits(again, family), expected)
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits(auto.eval(), family), expected)

    whole = again.merge_and_unload()
    assert torch.equal(logits(whole, family), expected)
    whole.save_pretrained(tmp_path / "whole")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(logits(loaded, family), expected)


def test_trainer_trains_it_and_it_generates(tmp_path: Path) -> None:
    model = adapted(base("llama", tmp_path / "base"), pseudo_heads=2)
    ids = inputs("llama")["input_ids"][0]
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = TrainingArguments(
        str(tmp_path / "run"), max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    examples: Any = [{"input_ids": ids, "labels": ids}] * 4
    Trainer(model, settings, train_dataset=examples).train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    longer = model.generate(input_ids=ids[None], max_new_tokens=3, do_sample=False)
    assert longer.shape[1] == len(ids) + 3


def test_what_cannot_be_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^rope must be 'token' or 'fractional' in an adapter"):
        IhaConfig(rope="virtual")
    model = adapted(base("llama", tmp_path))
    with pytest.raises(ValueError, match=r"^a model takes one IHA adapter"):
        model.add_adapter("second", IhaConfig())
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="peft type"):
        model.add_adapter("another", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"^unload is not possible for IHA"):
        model.unload()
    with pytest.raises(ValueError, match="already upcycled"):
        get_peft_model(iha.upcycle(tiny("llama"), 2), IhaConfig())
