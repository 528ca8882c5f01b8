"""Windows in four layers of five."""

from __future__ import annotations

from typing import Literal

import pydantic
import torch
from jaxtyping import Float
from torch import Tensor

import iha
from iha.hf.attention_modules import AttentionLayer
from iha_lab.baselines.baseline import Baseline, Inputs, plain_flops, sizes
from iha_lab.baselines.equipping import BaselineConfig


class LocalGlobalConfig(BaselineConfig):
    """Multi-head attention with a window of W tokens in four layers of five."""

    kind: Literal["local-global"] = "local-global"
    window: int = pydantic.Field(512, ge=1)

    @property
    def label(self) -> str:
        return "local-global" if self.window == 512 else f"local-global-w{self.window}"

    def build(self, layer: AttentionLayer) -> Window | None:
        return None if (layer.index or 0) % 5 == 4 else Window(*sizes(layer), self.window)


class Window(Baseline):
    """Plain attention to the W nearest tokens: n − s < W, or |n − s| < W without causality.

    It has no parameters. Forward 4·H·d·N·W FLOPs, N·(2W − 1) pairs in place of N·W without
    causality, and never more than the layer without its window.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, window: int) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim)
        self.window = window

    def forward(self, inputs: Inputs) -> Float[Tensor, "B H N d"]:
        # IHA with one pseudo-head and identities: its window layers take O(N·W), and it knows
        # where the queries stand.
        query = inputs.query
        of_queries, of_keys = (
            torch.eye(heads, device=query.device, dtype=query.dtype)[..., None]
            for heads in (self.num_heads, self.num_kv_heads)
        )
        return iha.interleaved_head_attention(
            *(query, inputs.key, inputs.value),
            *(of_queries, of_keys, of_keys, of_queries),
            attn_mask=inputs.visible,
            causal="token" if inputs.causal else None,
            window=self.window,
            query_offset=inputs.offset,
            scale=inputs.scale,
        )

    def flops(self, seq_len: int, causal: bool) -> int:
        return plain_flops(seq_len, self.num_heads, self.head_dim, causal, self.window)
