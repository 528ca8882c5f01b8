"""Talking-Heads attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iha_lab.baselines.rival import Rival, pairs, plain_flops, seen, softmax

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class TalkingHeads(Rival):
    """Heads mixed before and after the softmax (Shazeer et al., arXiv 2003.02436).

        J[h] = scale · Q[h] K[g(h)]ᵀ        L[l] = Σ_h J[h] P_l[h, l]
        W[l] = softmax(L[l])                U[o] = Σ_l W[l] P_w[l, o]        O[o] = U[o] V[g(o)]

    P_l (`of_logits`) and P_w (`of_weights`) are (H, H) and start as identities: plain attention.
    Forward 4·H·d + 4·H² FLOPs a visible pair.

    The weights of all heads exist at once, O(H·N·S) numbers: no fused kernel can be used.
    """

    # Not x_transformers' `Attend`: its logits are J + J·P from an identity P, so it starts at twice
    # the logits, not at plain attention, and it shares key heads among query heads in another
    # order than transformers. With P_l = 1 + P and G = H the two are equal, and tested to be.

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim)
        self.of_logits = nn.Parameter(torch.eye(num_heads))
        self.of_weights = nn.Parameter(torch.eye(num_heads))

    def forward(
        self,
        query: Float[Tensor, "B H N d"],
        key: Float[Tensor, "B G S d"],
        value: Float[Tensor, "B G S d"],
        *,
        visible: Bool[Tensor, "B 1 N S"] | None,
        causal: bool,
        scale: float,
        offset: Any = None,
    ) -> Float[Tensor, "B H N d"]:
        groups, N, S = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
        if visible is None:
            visible = seen(N, S, causal, query.device)
        logits = torch.einsum("bhns,hl->blns", scale * query @ key.mT, self.of_logits)
        weights = softmax(logits, visible)
        return torch.einsum("blns,lo->bons", weights, self.of_weights) @ value

    def flops(self, seq_len: int, causal: bool) -> int:
        mixing = 4 * self.num_heads**2 * pairs(seq_len, causal)
        return plain_flops(seq_len, self.num_heads, self.head_dim, causal) + mixing
