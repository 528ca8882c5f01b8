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

    `kernel` is (c_q, c_k), in queries and keys; the default is the paper's. By default scores are
    convolved before the softmax and heads mixed behind it; `both_sides` does both on both sides, as
    the configs that the authors published do.
    """

    kind: Literal["multi-token"] = "multi-token"
    kernel: tuple[pydantic.PositiveInt, pydantic.PositiveInt] = (6, 11)
    both_sides: bool = False

    @pydantic.field_validator("kernel")
    @classmethod
    def _centred(cls, kernel: tuple[int, int]) -> tuple[int, int]:
        if kernel[1] % 2 == 0:
            raise ValueError(f"kernel must have an odd number of keys, got {kernel[1]}")
        return kernel

    @property
    def label(self) -> str:
        parts: list[str] = [self.kind]
        parts += [] if self.kernel == (6, 11) else ["k{}x{}".format(*self.kernel)]
        parts += ["both-sides"] if self.both_sides else []
        return "-".join(parts)

    def build(self, layer: AttentionLayer) -> MultiToken:
        return MultiToken(*sizes(layer), self.kernel, self.both_sides, initializer(layer))


class MultiToken(Baseline):
    """Scores that see their neighbours (Golovneva et al., arXiv 2504.00927, sections 3.1 to 3.3).

        L[h, n, s] = Σ_{i, j} θ[h, i, j] · Mask_0(scale · Q[h] K[g]ᵀ)[n − i, s + j − (c_k − 1)/2]
        W[o] = Σ_h softmax(L[h]) w[h, o]
        O[o] = Y[o] · sigmoid(Y[o] · u + b),     Y[o] = RMSNorm(W[o] V[g(o)])

    with i < c_q and j < c_k. With `both_sides` there are a θ' and a w' of their own: the logits are
    Σ_h L[h] w'[h, ·], and the weights are convolved by θ', then masked with zeros, before w.

    Mask_0 puts zeros where the neighbouring query does not see the key;
    the softmax has its own mask behind the convolution. A neighbour counts only if n sees it and
    the key, too: without that, documents and padding would leak into each other at their borders,
    where the authors cut the sequence. Neighbouring queries are earlier ones, also without
    causality, for which the paper has no form.

    The weights w (H, H) mix all heads (c_h = H), the norm has weights (d,), and u (d,) and b are
    shared by all heads, as in the authors' code (facebookresearch/RAM, projects/mta). Kernels and
    mixing start as identities. The paper convolves in every fourth layer only; here it is in all.
    Forward 4·H·d + 2·H·c_q·c_k + 2·H² FLOPs per visible pair, and 2·H·d per token; the second and
    third term twice with `both_sides`.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kernel: tuple[int, int] = (6, 11),
        both_sides: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim)
        identity = torch.zeros(num_heads, *kernel)
        identity[:, 0, kernel[1] // 2] = 1
        sides = 2 if both_sides else 1
        self.kernels = nn.Parameter(identity.repeat(sides, 1, 1, 1))
        self.mixing = nn.Parameter(torch.eye(num_heads).repeat(sides, 1, 1))
        self.norm = nn.Parameter(torch.ones(head_dim))
        self.gate = nn.Parameter(std * torch.randn(head_dim, 1))
        self.gate_bias = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Inputs) -> Float[Tensor, "B H N d"]:
        refuse_a_cache(inputs, "Multi-Token Attention", "earlier queries")
        key, value = inputs.repeated()
        scores = inputs.scale * inputs.query @ key.mT
        visible = inputs.mask()
        visible = visible.expand(*visible.shape[:2], *scores.shape[2:])
        logits = convolved(scores, visible, self.kernels[0])
        if len(self.kernels) == 2:
            logits = torch.einsum("bhns,ho->bons", logits, self.mixing[1])
        weights = softmax(logits, visible)
        if len(self.kernels) == 2:
            weights = convolved(weights, visible, self.kernels[1]).masked_fill(~visible, 0.0)
        out = torch.einsum("bhns,ho->bons", weights, self.mixing[0]) @ value
        out = rms_norm(out, out.shape[-1:], self.norm, EPSILON)
        return out * (out @ self.gate + self.gate_bias).sigmoid()

    def flops(self, seq_len: int, causal: bool) -> int:
        H, sides, taps = self.num_heads, len(self.kernels), self.kernels[0, 0].numel()
        mixing = sides * 2 * H * (taps + H) * pairs(seq_len, causal)
        return super().flops(seq_len, causal) + mixing + 2 * seq_len * H * self.head_dim


def convolved(
    maps: Float[Tensor, "B H N N"],
    visible: Bool[Tensor, "#B #H N N"],
    kernel: Float[Tensor, "H q k"],
) -> Float[Tensor, "B H N N"]:
    """Convolve what each query has of each key it sees, over earlier queries and nearby keys."""
    N = maps.shape[-1]
    out = torch.zeros_like(maps)
    for i in range(min(kernel.shape[1], N)):
        # Row n is that of query n − i, of what that query sees, and whether n sees n − i.
        rows, seen = (pad(t[..., : N - i, :], (0, 0, i, 0)) for t in (maps, visible))
        near = pad(visible.diagonal(-i, -2, -1), (i, 0))[..., None]
        rows = rows.masked_fill(~(visible & seen & near), 0.0)
        taps = kernel[:, None, i : i + 1]
        out = out + conv2d(rows, taps, padding=(0, taps.shape[-1] // 2), groups=len(taps))
    return out
