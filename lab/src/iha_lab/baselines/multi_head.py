"""Plain attention, with the model's own heads or with another number of them."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pydantic

from iha.hf.attention_modules import attention_layers
from iha_lab.baselines.baseline import head_dim
from iha_lab.baselines.equipping import AttentionConfig


class MultiHeadConfig(AttentionConfig):
    """Multi-head attention, global in every layer (Vaswani et al., arXiv 1706.03762).

    `heads` is for controls that have as many heads as IHA has pseudo-heads, H·P (default: the
    model's H). By default `head_dim` follows as width / heads: more and smaller heads, with the
    parameters and FLOPs of the plain model, so the number of heads is all that differs. With
    `head_dim` = d, the heads are as wide as IHA's, and the projections have P times the parameters.
    Key/value heads grow with the query heads. It is the model's config that changes: `configure`.
    """

    kind: Literal["mha"] = "mha"
    heads: int | None = pydantic.Field(default=None, ge=1)
    head_dim: int | None = pydantic.Field(default=None, ge=1)

    @property
    def label(self) -> str:
        parts = ["mha"]
        parts += [f"h{self.heads}"] if self.heads else []
        parts += [f"d{self.head_dim}"] if self.head_dim else []
        return "-".join(parts)

    def configure(self, config: Any) -> Any:
        before, width = config.num_attention_heads, config.hidden_size
        heads = self.heads or before
        kv_heads = getattr(config, "num_key_value_heads", None) or before
        if kv_heads * heads % before:
            raise ValueError(
                f"heads = {heads} leaves no whole number of key/value heads, of which the model has"
                f" {kv_heads} for {before} heads; take a multiple of {before // kv_heads}."
            )
        if self.head_dim is None and width % heads:
            raise ValueError(f"heads = {heads} must divide the width, {width}; or give head_dim.")
        size = self.head_dim or width // heads
        if self.head_dim not in (None, width // heads) and not hasattr(config, "head_dim"):
            raise ValueError(
                f"head_dim = {size} cannot be had from a {type(config).__name__}, whose heads are"
                " width / heads wide; leave it out."
            )
        if size % 2 and hasattr(config, "rope_parameters"):
            raise ValueError(
                f"heads = {heads} of {size} dimensions cannot be rotated, which takes an even"
                " number; take fewer heads."
            )
        changed = copy.deepcopy(config)
        changed.num_attention_heads = heads
        if hasattr(config, "num_key_value_heads"):
            changed.num_key_value_heads = kv_heads * heads // before
        if hasattr(config, "head_dim"):
            changed.head_dim = size
        return changed

    def equip(self, model: Any, seq_len: int | None) -> Any:
        for layer in attention_layers(model):
            found = layer.num_heads, head_dim(layer)
            wanted = self.heads or found[0], self.head_dim or found[1]
            if found != wanted:
                raise ValueError(
                    f"the model has {found[0]} heads of {found[1]} dimensions, and {self.label}"
                    f" wants {wanted[0]} of {wanted[1]}; build it from configure(config)."
                )
        return model
