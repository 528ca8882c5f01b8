"""Talking-Heads attention."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iha.hf.attention_modules import AttentionLayer
from iha_lab.baselines.baseline import Baseline, Inputs, pairs, sizes, softmax
from iha_lab.baselines.equipping import BaselineConfig


class TalkingHeadsConfig(BaselineConfig):
    """Heads mixed before and after the softmax (Shazeer et al., arXiv 2003.02436)."""

    kind: Literal["talking-heads"] = "talking-heads"

    def build(self, layer: AttentionLayer) -> TalkingHeads:
        return TalkingHeads(*sizes(layer))


class TalkingHeads(Baseline):
    """Heads mixed before and after the softmax (Shazeer et al., arXiv 2003.02436).

        J[h] = scale · Q[h] K[g(h)]ᵀ        L[l] = Σ_h J[h] P_l[h, l]
        W[l] = softmax(L[l])                U[o] = Σ_l W[l] P_w[l, o]        O[o] = U[o] V[g(o)]

    P_l (`of_logits`) and P_w (`of_weights`) are (H, H) and start as identities: plain attention.
    Forward 4·H·d + 4·H² FLOPs per visible pair.

    The weights of all heads exist at once, O(H·N·S) numbers: no fused kernel can be used.
    """

    # Not x_transformers' `Attend`: its logits are J + J·P from an identity P, so it starts at twice
    # the logits, not at plain attention, and it shares key heads among query heads in another
    # order than transformers. With P_l = 1 + P and G = H the two are equal, and tested to be.

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim)
        self.of_logits = nn.Parameter(torch.eye(num_heads))
        self.of_weights = nn.Parameter(torch.eye(num_heads))

    def forward(self, inputs: Inputs) -> Float[Tensor, "B H N d"]:
        key, value = inputs.repeated()
        scores = inputs.scale * inputs.query @ key.mT
        logits = torch.einsum("bhns,hl->blns", scores, self.of_logits)
        weights = softmax(logits, inputs.mask())
        return torch.einsum("blns,lo->bons", weights, self.of_weights) @ value

    def flops(self, seq_len: int, causal: bool) -> int:
        mixing = 4 * self.num_heads**2 * pairs(seq_len, causal)
        return super().flops(seq_len, causal) + mixing
