"""Windows in four layers of five."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import iha
from iha_lab.baselines.rival import Rival, plain_flops


class Window(Rival):
    """Plain attention to the W nearest tokens: n − s < W, or |n − s| < W without causality.

    It has no parameters. Forward 4·H·d·N·W FLOPs, N·(2W − 1) pairs in place of N·W without
    causality, and never more than the layer without its window.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, window: int) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim)
        self.window = window

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        visible: Tensor | None,
        causal: bool,
        scale: float,
        offset: Any = None,
    ) -> Tensor:
        # IHA with one pseudo-head and identities, whose window layers take O(N·W) and which knows
        # where the queries stand.
        of_queries, of_keys = (
            torch.eye(heads, device=query.device, dtype=query.dtype)[..., None]
            for heads in (self.num_heads, self.num_kv_heads)
        )
        return iha.interleaved_head_attention(
            query,
            key,
            value,
            of_queries,
            of_keys,
            of_keys,
            of_queries,
            attn_mask=visible,
            causal="token" if causal else None,
            window=self.window,
            query_offset=offset,
            scale=scale,
        )

    def flops(self, seq_len: int, causal: bool) -> int:
        return plain_flops(seq_len, self.num_heads, self.head_dim, causal, self.window)
