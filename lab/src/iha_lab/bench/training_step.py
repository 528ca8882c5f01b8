"""A whole model's training step: the paper's schedule against the plain global model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import iha
from iha_lab.bench.cases import Model


def plain(case: Model, device: torch.device) -> Any:
    config = LlamaConfig(
        num_hidden_layers=case.num_layers,
        hidden_size=case.hidden_size,
        num_attention_heads=case.num_heads,
        num_key_value_heads=case.num_heads,
        intermediate_size=case.intermediate_size,
        vocab_size=case.vocab_size,
        max_position_embeddings=case.N * case.P,
        use_cache=False,
    )
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM(config).to(getattr(torch, case.dtype))


def mixed(case: Model, device: torch.device) -> Any:
    """Build the paper's model: four IHA layers with W = N/(2P²) for one plain global layer."""
    schedule = iha.hybrid_schedule(case.num_layers, case.N, case.P)
    return iha.upcycle(
        plain(case, device),
        case.P,
        layers=schedule.layers,
        window=schedule.window,
        init="scratch",
        rope="virtual",
    )


def step(model: Any, case: Model, device: torch.device) -> Callable[[], None]:
    """Make a training step: forward, backward and AdamW on random tokens."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(case.vocab_size, (case.B, case.N), generator=random).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    model.train()

    def action() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return action
