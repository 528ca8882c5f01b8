"""Training an upcycled model: by hand, with `Trainer`, with PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import iha
from tests.hf.families import inputs, tiny, trained

IDS = torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(3))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("causal", ["flat", "token"])
def test_gradients_reach_every_pseudo_head_within_two_steps(causal: Any) -> None:
    """From the exact start.

    The first step moves the collapse of the free pseudo-heads away from zero; in the second their
    queries receive gradients.
    """
    model = iha.upcycle(tiny("llama"), 3, causal=causal)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reached: dict[str, torch.Tensor] = {}
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        for name, parameter in model.named_parameters():
            if "head_mixing" in name:
                assert parameter.grad is not None
                size = parameter.grad.abs().amax((0, 1))
                reached[name] = torch.maximum(reached.get(name, torch.zeros(3)), size)
        optimizer.step()
    assert len(reached) == 4 * 3
    for name, size in reached.items():
        assert (size > 1e-7).all(), f"{name}: {size}"


def spread(tensor: torch.Tensor) -> float:
    """How far apart the pseudo-heads of a mixing tensor lie."""
    return float((tensor - tensor.mean(-1, keepdim=True)).norm())


@pytest.mark.parametrize("causal", ["flat", "token"])
def test_pseudo_heads_move_apart(causal: Any) -> None:
    torch.manual_seed(0)
    model = iha.upcycle(tiny("llama"), 3, causal=causal)
    mixing = model.model.layers[1].self_attn.head_mixing
    start = mixing.alpha_v.detach().clone()
    assert spread(mixing.alpha_k.detach()) == 0
    optimizer = torch.optim.AdamW(iha.mixing_parameters(model), lr=1e-2, weight_decay=0.0)
    for _ in range(12):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert spread(mixing.alpha_k.detach()) > 0.01
    # Slowly: their gradients differ only as far as the keys' weights already do. Rounding is 1e-6.
    assert spread(mixing.alpha_v.detach() - start) > 1e-4


def test_equal_replicas_without_noise_stay_equal() -> None:
    """Why ε is there: without it, pseudo-keys and -values get equal gradients for ever."""
    model = iha.upcycle(tiny("llama"), 3, causal="token", value_noise=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    values = model.model.layers[1].self_attn.head_mixing.alpha_v
    torch.testing.assert_close(values[..., 0], values[..., 1])


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, **changes,
    )  # fmt: skip


def test_trainer(tmp_path: Path) -> None:
    model = iha.upcycle(tiny("llama"), 2)
    before = [p.detach().clone() for p in iha.mixing_parameters(model)]
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=ROWS)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    changed = [
        not torch.equal(p, b) for p, b in zip(iha.mixing_parameters(model), before, strict=True)
    ]
    assert all(changed)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("reentrant", [False, True])
# The name that every version has; 5.23 has a new one beside it.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = trained("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_lora_on_the_projections_while_the_mixing_trains(tmp_path: Path) -> None:
    """A few steps; then saved, loaded and merged, each the same function."""
    base = iha.upcycle(tiny("llama"), 2)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["head_mixing"], lora_dropout=0.0
    )
    model = get_peft_model(base, config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-1] for name in trained if "head_mixing" in name} == {
        "alpha_q", "alpha_k", "alpha_v", "collapse",
    }  # fmt: skip
    assert all("lora" in name or "head_mixing" in name for name in trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = logits(model)
    Trainer(model=model, args=arguments(tmp_path / "run"), train_dataset=ROWS).train()
    expected = logits(model)
    assert (expected - start).abs().max() > 0.01
    for name, parameter in model.named_parameters():
        # PEFT keeps the mixing that it trains behind a wrapper; that one has to be what runs.
        assert torch.equal(parameter, before[name]) == (name not in trained), name

    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-6, rtol=0)

    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(last), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rope", ["token", "virtual", "fractional"])
def test_wrapping_the_mixing_for_peft_changes_nothing(rope: Any) -> None:
    model = iha.upcycle(tiny("llama"), 2, init="scratch", rope=rope)
    expected = logits(model)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["head_mixing"])
    assert torch.equal(logits(get_peft_model(model, config)), expected)


@pytest.mark.parametrize("rope", ["token", "virtual", "fractional"])
def test_lora_on_the_mixing_tensors_themselves(rope: Any) -> None:
    """PEFT's ParamWrapper takes the place of the mixing: one around the other, for two tensors."""
    model = iha.upcycle(tiny("llama"), 2, init="scratch", rope=rope)
    expected = logits(model)
    config = LoraConfig(
        r=2, target_parameters=["head_mixing.alpha_q", "head_mixing.collapse"], lora_dropout=0.0
    )
    wrapped = get_peft_model(model, config)
    assert torch.equal(logits(wrapped), expected)
    lora = [p for name, p in wrapped.named_parameters() if "mixing" in name and "lora_" in name]
    assert len(lora) == 2 * 2 * 3
    with torch.no_grad():
        for parameter in lora:
            parameter.normal_(std=0.3)
    trained = logits(wrapped)
    assert (trained - expected).abs().max() > 0.01
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), trained, atol=1e-4, rtol=1e-4)


def test_attention_dropout_is_on_in_training_only() -> None:
    model = iha.upcycle(tiny("llama", attention_dropout=0.5), 2)
    given = inputs("llama")
    assert torch.equal(model(**given).logits, model(**given).logits)
    model.train()
    assert not torch.equal(model(**given).logits, model(**given).logits)


def test_data_in_bfloat16_autocast_trains() -> None:
    model = iha.upcycle(tiny("llama"), 2).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in iha.mixing_parameters(model))
