"""Multi-Token Attention."""

from __future__ import annotations

from typing import Literal

import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, rms_norm

from iha.hf.attention_modules import AttentionLayer
from iha_lab.baselines.baseline import (
    Baseline,
    Inputs,
    initializer,
    pairs,
    refuse_a_cache,
    sizes,
    softmax,
)
from iha_lab.baselines.equipping import BaselineConfig

EPSILON = 1e-5  # of the norm


class MultiTokenConfig(BaselineConfig):
    """Scores that see their neighbours (Golovneva et al., arXiv 2504.00927).

    `kernel` is (c_q, c_k), in queries and keys; the default is the paper's.
    """

    kind: Literal["multi-token"] = "multi-token"
    kernel: tuple[pydantic.PositiveInt, pydantic.PositiveInt] = (6, 11)

    @pydantic.field_validator("kernel")
    @classmethod
    def _centred(cls, kernel: tuple[int, int]) -> tuple[int, int]:
        if kernel[1] % 2 == 0:
            raise ValueError(f"kernel must have an odd number of keys, got {kernel[1]}")
        return kernel

    @property
    def label(self) -> str:
        default = self.kernel == (6, 11)
        return self.kind if default else "{}-k{}x{}".format(self.kind, *self.kernel)

    def build(self, layer: AttentionLayer) -> MultiToken:
        return MultiToken(*sizes(layer), self.kernel, initializer(layer))


class MultiToken(Baseline):
    """Scores that see their neighbours (Golovneva et al., arXiv 2504.00927, sections 3.1 to 3.3).

        L[h, n, s] = Σ_{i, j} θ[h, i, j] · Mask_0(scale · Q[h] K[g]ᵀ)[n − i, s + j − (c_k − 1)/2]
        W[o] = Σ_h softmax(L[h]) w[h, o]
        O[o] = Y[o] · sigmoid(Y[o] · u + b),     Y[o] = RMSNorm(W[o] V[g(o)])

    with i < c_q and j < c_k. Mask_0 puts zeros where the neighbouring query does not see the key;
    the softmax has its own mask behind the convolution. A neighbour counts only if n sees it and
    the key, too: without that, documents and padding would leak into each other at their borders,
    where the authors cut the sequence. Neighbouring queries are earlier ones, also without
    causality, for which the paper has no form.

    The weights w (H, H) mix all heads (c_h = H), the norm has weights (d,), and u (d,) and b are
    shared by all heads, as in the authors' code (facebookresearch/RAM, projects/mta). θ and w start
    as identities. Its own configs have more options than are built here: a second convolution and a
    second head mixing on the other side of the softmax, and the key-query convolution in every
    fourth layer only; here it is in all.
    Forward 4·H·d + 2·H·c_q·c_k + 2·H² FLOPs per visible pair, and 2·H·d per token.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kernel: tuple[int, int] = (6, 11),
        std: float = 0.02,
    ) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim)
        identity = torch.zeros(num_heads, *kernel)
        identity[:, 0, kernel[1] // 2] = 1
        self.kernel = nn.Parameter(identity)
        self.of_weights = nn.Parameter(torch.eye(num_heads))
        self.norm = nn.Parameter(torch.ones(head_dim))
        self.gate = nn.Parameter(std * torch.randn(head_dim, 1))
        self.gate_bias = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Inputs) -> Float[Tensor, "B H N d"]:
        refuse_a_cache(inputs, "Multi-Token Attention", "earlier queries")
        key, value = inputs.repeated()
        scores = inputs.scale * inputs.query @ key.mT
        visible = inputs.mask()
        visible = visible.expand(*visible.shape[:2], *scores.shape[2:])
        weights = softmax(self.convolved(scores, visible), visible)
        out = torch.einsum("bhns,ho->bons", weights, self.of_weights) @ value
        out = rms_norm(out, out.shape[-1:], self.norm, EPSILON)
        return out * (out @ self.gate + self.gate_bias).sigmoid()

    def convolved(
        self, scores: Float[Tensor, "B H N N"], visible: Bool[Tensor, "#B #H N N"]
    ) -> Float[Tensor, "B H N N"]:
        N = scores.shape[-1]
        logits = torch.zeros_like(scores)
        for i in range(min(self.kernel.shape[1], N)):
            # Row n is that of query n − i, of what that query sees, and whether n sees n − i.
            rows, seen = (pad(t[..., : N - i, :], (0, 0, i, 0)) for t in (scores, visible))
            near = pad(visible.diagonal(-i, -2, -1), (i, 0))[..., None]
            rows = rows.masked_fill(~(visible & seen & near), 0.0)
            taps = self.kernel[:, None, i : i + 1]
            logits = logits + conv2d(rows, taps, padding=(0, taps.shape[-1] // 2), groups=len(taps))
        return logits

    def flops(self, seq_len: int, causal: bool) -> int:
        H, taps = self.num_heads, self.kernel[0].numel()
        mixing = 2 * H * (taps + H) * pairs(seq_len, causal)
        return super().flops(seq_len, causal) + mixing + 2 * seq_len * H * self.head_dim
