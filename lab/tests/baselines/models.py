"""Tiny random models, and every kind of attention for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from iha_lab import baselines

PLAIN_AT_START = {
    "talking-heads": baselines.TalkingHeadsConfig(),
    "knocking-heads": baselines.KnockingHeadsConfig(),
    "knocking-heads-linear": baselines.KnockingHeadsConfig(values="linear", queries_keys=True),
    "iha exact": baselines.InterleavedConfig(rope="token", init="upcycle"),
}
# Those that decode with a cache.
CACHED = {
    "mha": baselines.MultiHeadConfig(),
    "local-global": baselines.LocalGlobalConfig(window=3),
    "paired-heads": baselines.PairedHeadsConfig(rope="token"),
    "talking-heads": baselines.TalkingHeadsConfig(),
    "differential": baselines.DifferentialConfig(),
    "differential-v2": baselines.DifferentialV2Config(),
    "gated": baselines.GatedConfig(),
    "gated-headwise": baselines.GatedConfig(gate="headwise"),
    "mea": baselines.ExplicitConfig(),
    "knocking-heads": baselines.KnockingHeadsConfig(),
    "iha": baselines.InterleavedConfig(pseudo_heads=2, rope="token"),
    "iha ablated": baselines.InterleavedConfig(
        pseudo_heads=4, pseudo_queries=2, rope="token", causal="token", mixes=("q", "o")
    ),
    "folded": baselines.InterleavedConfig(pseudo_heads=1),
}
EVERY = {
    **CACHED,
    "knocking-heads-linear": baselines.KnockingHeadsConfig(values="linear", queries_keys=True),
    "knocking-heads-queries-keys": baselines.KnockingHeadsConfig(queries_keys=True),
    "multi-token": baselines.MultiTokenConfig(),
    "multi-token-both": baselines.MultiTokenConfig(kernel=(2, 3), both_sides=True),
    "dcmha": baselines.ComposableConfig(),
    "2-simplicial": baselines.SimplicialConfig(),
    "2-simplicial-windows": baselines.SimplicialConfig(windows=(4, 2), biases=True),
}


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**{**sizes, **changes})


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(**changes)).eval()


def bert_config(**changes: Any) -> BertConfig:
    sizes = {
        "vocab_size": 3,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "type_vocab_size": 1,
        "pad_token_id": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
    }
    return BertConfig(**{**sizes, **changes})


def bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    return BertForTokenClassification(bert_config(**changes)).eval()


def away_from_the_start(model: Any) -> Any:
    """Its baselines' parameters, most of which start as identities, moved."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".baseline." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model
