"""Windows in four layers of five."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pydantic
import torch
from jaxtyping import Float
from torch import Tensor

from iha.hf.attention_modules import AttentionLayer
from iha_lab.baselines.baseline import Baseline, Inputs, plain_flops, sizes
from iha_lab.baselines.equipping import BaselineConfig

BLOCK = 128  # queries at least that attend at once


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

    SDPA in blocks of queries, each with the keys that its windows reach: N·(W + block) pairs.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, window: int) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim)
        self.window = window

    def forward(self, inputs: Inputs) -> Float[Tensor, "B H N d"]:
        W, N, S = self.window, inputs.query.shape[2], inputs.key.shape[2]
        if W >= S:
            return inputs.attend()
        first = S - N if inputs.offset is None else inputs.offset
        places = torch.arange(S, device=inputs.query.device)
        blocks: list[Tensor] = []
        for start in range(0, N, step := max(W, BLOCK)):
            rows, within = slice(start, min(start + step, N)), slice(0, S)
            if isinstance(first, int):  # else a tensor, which is not asked where it is
                later = 0 if inputs.causal else W - 1
                within = slice(max(0, first + start - W + 1), first + rows.stop + later)
            distance = places[:N][rows, None] + first - places[within]
            visible = (distance.abs() < W)[None, None]
            if inputs.causal:
                visible &= distance >= 0
            if inputs.visible is not None:
                mask = inputs.visible
                visible = visible & mask.expand(*mask.shape[:2], N, S)[:, :, rows, within]
            block = dataclasses.replace(
                inputs,
                query=inputs.query[:, :, rows],
                key=inputs.key[:, :, within],
                value=inputs.value[:, :, within],
                visible=visible,
            )
            blocks.append(block.attend())
        return torch.cat(blocks, 2)

    def flops(self, seq_len: int, causal: bool) -> int:
        return plain_flops(seq_len, self.num_heads, self.head_dim, causal, self.window)
