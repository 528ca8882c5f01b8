"""Dynamically Composable Multi-Head Attention."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm

from iha.hf.attention_modules import AttentionLayer
from iha_lab.baselines.baseline import (
    Inputs,
    StateReading,
    fresh,
    pairs,
    projection,
    refuse_a_cache,
    sizes,
    softmax,
)
from iha_lab.baselines.equipping import BaselineConfig

RANK = 2  # R of the dynamic projections, in all of the paper's models
EPSILON = 1e-6  # of the norm


class ComposableConfig(BaselineConfig):
    """Head mixing that depends on the tokens, before and after the softmax (arXiv 2405.08553)."""

    kind: Literal["dcmha"] = "dcmha"

    def build(self, layer: AttentionLayer) -> Composable:
        return Composable(*sizes(layer), projection(layer, "query").in_features)


class Composable(StateReading):
    """Dynamically Composable Multi-Head Attention (Xiao et al., arXiv 2405.08553, section 3).

    Scores, then softmax weights, a vector A of H numbers for each pair of tokens (n, s), become

        A W_b + Σ_{t ∈ {n, s}} (A w1_t w2_t + A ⊙ g_t)
        [w1_t, w2_t] = GELU(X[t] W_1) W_2 (H·R and R·H numbers),  g_t = tanh(X[t] W_g)

    with W_1, W_2, W_g of their own for query and key tokens, for scores and for weights; each
    column of w1 is divided by its RMS. X are the states that the layer's projections read, R = 2
    and W_1 has 4·H columns, as in the authors' code (Caiyun-AI/DCFormer), and so are the starts,
    near plain attention; W_b starts as an identity.
    Forward 4·H·d + 4·H² + 16·R·H + 8·H FLOPs per visible pair, and 64·R·H² per token beside the
    linear layers W_1 and W_g.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, in_features: int) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim)
        H, E, K = num_heads, in_features, 2 * RANK * num_heads
        # Of queries and keys for scores, of queries and keys for weights.
        self.first = fresh(E, 4 * K, std=math.sqrt(2 / (E + K)))
        small = 0.02 / (math.sqrt(K) * (H + RANK))
        self.second = nn.Parameter(small * torch.randn(4, K, 2 * RANK, H))
        self.gates = fresh(E, 4 * H, std=0.005 * math.sqrt(2 / (E + H)))
        self.base = nn.Parameter(torch.eye(H).repeat(2, 1, 1))

    def forward(self, inputs: Inputs) -> Float[Tensor, "B H N d"]:
        refuse_a_cache(inputs, "DCMHA", "the keys' head mixing")
        states = self.states()
        hidden = gelu(self.first(states)).unflatten(-1, (4, -1))
        first, second = torch.einsum("bnck,ckrh->cbnrh", hidden, self.second).chunk(2, -2)
        first = rms_norm(first, first.shape[-1:], eps=EPSILON)
        gates = self.gates(states).tanh().unflatten(-1, (4, -1)).movedim(2, 0)

        def composed(heads: Float[Tensor, "B H N S"], which: int) -> Float[Tensor, "B H N S"]:
            out = torch.einsum("bhns,ho->bons", heads, self.base[which])
            for c, t in ((2 * which, "n"), (2 * which + 1, "s")):
                low = torch.einsum(f"bhns,b{t}rh->brns", heads, first[c])
                out = out + torch.einsum(f"brns,b{t}ro->bons", low, second[c])
                out = out + torch.einsum(f"bhns,b{t}h->bhns", heads, gates[c])
            return out

        key, value = inputs.repeated()
        logits = composed(inputs.scale * inputs.query @ key.mT, 0)
        return composed(softmax(logits, inputs.mask()), 1) @ value

    def flops(self, seq_len: int, causal: bool) -> int:
        H = self.num_heads
        mixing = (4 * H**2 + 16 * RANK * H + 8 * H) * pairs(seq_len, causal)
        return super().flops(seq_len, causal) + mixing + 2 * seq_len * self.second.numel()
