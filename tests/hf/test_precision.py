"""The mixing tensors in half precision stay float32, and train; Trainer does not decay them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import iha
from tests.hf.families import inputs, tiny

HALF = [torch.bfloat16, torch.float16]


def dtypes(model: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in iha.mixing_parameters(model)}


def trained(model: Any) -> Any:
    """As after training: no tensor is near the exact start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in iha.mixing_parameters(model):
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("dtype", HALF)
def test_upcycled_in_half_precision(dtype: torch.dtype) -> None:
    model = iha.upcycle(tiny("llama").to(dtype), 3)
    assert dtypes(model) == {torch.float32}
    assert model(**inputs("llama")).logits.dtype == dtype


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to", "to_dtype_and_device"])
def test_casting_leaves_the_mixing_wide(cast: str) -> None:
    model = trained(iha.upcycle(tiny("llama"), 3))
    before = [p.detach().clone() for p in iha.mixing_parameters(model)]
    casts = {"to": ("to", torch.bfloat16), "to_dtype_and_device": ("to", "cpu", torch.float16)}
    name, *arguments = casts.get(cast, (cast,))
    getattr(model, name)(*arguments)
    assert model.lm_head.weight.dtype in HALF
    assert dtypes(model) == {torch.float32}
    assert all(map(torch.equal, before, iha.mixing_parameters(model)))


def test_the_callers_word_on_dtype_holds() -> None:
    assert dtypes(iha.HeadMixing(4, dtype=torch.bfloat16, init="upcycle")) == {torch.bfloat16}
    assert dtypes(iha.HeadMixing(4, dtype=torch.bfloat16, init="upcycle").half()) == {torch.float16}
    assert dtypes(iha.HeadMixing(4, init="upcycle").double()) == {torch.float64}
    assert dtypes(iha.HeadMixing(4, init="upcycle").double().half()) == {torch.float32}
    layer = iha.InterleavedHeadAttention(
        16, 4, pseudo_heads=2, dtype=torch.bfloat16, init="scratch"
    )
    assert layer.q_proj.weight.dtype == torch.bfloat16
    assert dtypes(layer) == {torch.float32}
    x = torch.randn(1, 5, 16, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [*HALF, "auto", None, torch.float32])
def test_saved_and_loaded(tmp_path: Path, dtype: Any) -> None:
    model = trained(iha.upcycle(tiny("llama").bfloat16(), 3))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert dtypes(loaded) == {torch.float32}
    for mine, other in zip(*map(iha.mixing_parameters, (model, loaded)), strict=True):
        assert torch.equal(mine, other)


def test_every_entry_moves_in_a_bfloat16_model() -> None:
    """In bfloat16 itself, none that is near 1 does: its steps there are 0.004 and 0.008."""
    model = iha.upcycle(tiny("llama").bfloat16(), 3)
    optimizer = torch.optim.AdamW(iha.parameter_groups(model, lr=1e-4))
    before = [p.detach().clone() for p in iha.mixing_parameters(model)]
    ids = inputs("llama")["input_ids"]
    for _ in range(5):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for start, end in zip(before, iha.mixing_parameters(model), strict=True):
        assert (start != end)[start.abs() > 0.5].float().mean() > 0.95


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_a_model_under_autocast(family: str, dtype: torch.dtype) -> None:
    """Gemma 2 has a soft-cap, for which a CPU has only the reference."""
    model = trained(iha.upcycle(tiny(family), 2, backend="reference"))
    given = inputs(family)
    expected = model(**given).logits
    with torch.autocast("cpu", dtype=dtype):
        output = model(**given).logits
    assert output.isfinite().all()
    assert (output - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("wrapped", [False, True])
def test_trainer_does_not_decay_them(tmp_path: Path, wrapped: bool) -> None:
    model = iha.upcycle(tiny("llama"), 2, per_head_collapse=True)
    names = {name for name, _ in model.named_parameters()}
    assert "model.layers.0.self_attn.head_mixing.collapse" in names
    if wrapped:
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["head_mixing"])
        model = get_peft_model(model, config)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, weight_decay=0.1
    )
    optimizer = Trainer(model=model, args=arguments).create_optimizer()
    iha.check_optimizers(model, optimizer)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
