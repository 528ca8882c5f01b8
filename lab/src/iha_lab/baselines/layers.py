"""What rivals need to know of an attention module beyond its heads."""

from __future__ import annotations

from typing import Any

from torch import nn

from iha.hf.attention_modules import AttentionLayer

# Names of the projections: Llama's and its kin's, BERT's and its kin's.
_NAMES = {
    "query": ("q_proj", "query"),
    "key": ("k_proj", "key"),
    "value": ("v_proj", "value"),
}


def head_dim(layer: AttentionLayer) -> int:
    module: Any = layer.module
    for holder in (module, module.config):
        for name in ("head_dim", "attention_head_size"):
            if isinstance(size := getattr(holder, name, None), int):
                return size
    return module.config.hidden_size // layer.num_heads


def projection(layer: AttentionLayer, which: str) -> nn.Linear:
    """The layer's own projection to queries, keys or values.

    Raises ValueError for a layer without, whose projections are one matrix, or of another shape.
    """
    heads = layer.num_heads if which == "query" else layer.num_kv_heads
    for name in _NAMES[which]:
        found = getattr(layer.module, name, None)
        if isinstance(found, nn.Linear) and found.out_features == heads * head_dim(layer):
            return found
    raise ValueError(
        f"layer {layer.name!r} ({type(layer.module).__name__}) has no {which} projection of its own"
        f" ({' or '.join(_NAMES[which])}), which this rival works on; use a model of Llama's or"
        " BERT's kind."
    )
