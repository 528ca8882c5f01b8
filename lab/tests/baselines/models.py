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

from iha_lab.baselines import choices

PLAIN_AT_START = {
    "talking-heads": choices.TalkingHeads(),
    "knocking-heads": choices.KnockingHeads(),
    "knocking-heads-linear": choices.KnockingHeads(values="linear", queries_keys=True),
    "iha exact": choices.Interleaved(rope="token", init="upcycle"),
}
# Those that decode with a cache.
CACHED = {
    "mha": choices.Plain(),
    "local-global": choices.LocalGlobal(window=3),
    "talking-heads": choices.TalkingHeads(),
    "differential": choices.Differential(),
    "knocking-heads": choices.KnockingHeads(),
    "iha": choices.Interleaved(pseudo_heads=2, rope="token"),
}
EVERY = {
    **CACHED,
    "knocking-heads-linear": choices.KnockingHeads(values="linear", queries_keys=True),
    "knocking-heads-queries-keys": choices.KnockingHeads(queries_keys=True),
    "2-simplicial": choices.Simplicial(),
    "2-simplicial-windows": choices.Simplicial(windows=(4, 2), biases=True),
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
    """Its rivals' parameters, most of which start as identities, moved."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".rival." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model
